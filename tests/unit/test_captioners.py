"""The caption stage: columns, real programs, and a tiny vision-language model that is built here."""

import json
import sys
import time

import pytest

from data_prep.captioners.cache import CaptionCache
from data_prep.captioners.command import CommandCaptioner
from data_prep.captioners.vision_language import VisionLanguageCaptioner
from data_prep.pipeline.engines import LocalEngine
from data_prep.pipeline.rows import Dropped, RowFailed, read_rows
from data_prep.pipeline.stage import Place
from data_prep.stages.caption import CaptionFromColumns, CaptionWithCommand, CaptionWithModel
from tests.unit.made_clips import FRAMES, clip_row, panned, pipeline

HERE = LocalEngine(workers=0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    clip_row(folder, "clip", panned(40))
    return folder / "clip.mp4"


def program(script, *words):
    """A captioner that runs this Python script."""
    return CommandCaptioner([sys.executable, "-c", script, *words], "What is seen?", 4, timeout_seconds=20)


# --- Columns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "caption"),
    [
        ({"caption": "  a\n dog "}, "a dog"),
        ({"caption": " ", "captions": ["", " one cat", "two"]}, "one cat"),
        ({"captions": None, "text": "a bird"}, "a bird"),
    ],
)
def test_a_caption_comes_from_the_first_column_that_has_one(row, caption, tmp_path):
    [found] = CaptionFromColumns().apply(row, Place(tmp_path, "caption"))
    assert found == row | {"caption": caption}


def test_a_caption_comes_from_a_file_beside_the_video(tmp_path):
    (tmp_path / "a.txt").write_text("a\nfish\n")
    (tmp_path / "b.json").write_text(json.dumps({"long": ["a whale"], "short": "fish"}))
    stage = CaptionFromColumns(columns=["long"], suffixes=[".txt", ".json"])
    place = Place(tmp_path, "caption")
    found = [next(iter(stage.apply({"path": str(tmp_path / name)}, place))) for name in ("a.mp4", "b.mp4", "c.mp4")]
    assert [row["caption"] for row in found[:2]] == ["a fish", "a whale"]
    assert isinstance(found[2], Dropped)
    assert found[2].reason == "empty caption"


# --- Programs ----------------------------------------------------------------------------------------------


def test_a_program_gets_clip_frames_and_prompt_as_arguments_and_no_shell(clip):
    script = (
        "import os, sys; print(os.path.basename(sys.argv[1]), len(os.listdir(sys.argv[2])), sys.argv[3], sys.argv[4])"
    )
    said = program(script, "{clip}", "{frames}", "{prompt}", "$(touch hacked); *").caption(clip, FRAMES)
    assert said.split() == ["clip.mp4", "4", "What", "is", "seen?", "$(touch", "hacked);", "*"]


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("import sys; sys.exit('no model here')", "caption command failed: exit code 1: no model here"),
        ("import sys; sys.stdout.buffer.write(bytes([255]))", "caption command wrote no UTF-8"),
    ],
)
def test_a_program_that_fails_fails_the_clip_by_name(clip, script, why):
    with pytest.raises(RowFailed, match=why):
        program(script, "{clip}").caption(clip, FRAMES)


def test_a_program_that_hangs_is_ended_with_its_children(clip, tmp_path):
    script = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2); open({str(tmp_path / "alive")!r}, 'w')"])
time.sleep(60)
"""
    captioner = program(script, "{clip}")
    captioner.timeout_seconds = 1.0
    with pytest.raises(RowFailed, match="too long: over 1 s"):
        captioner.caption(clip, FRAMES)
    time.sleep(2)
    assert not (tmp_path / "alive").exists()


@pytest.mark.parametrize("command", [[], ["describe"], ["describe", "{prompt}"]])
def test_a_program_that_is_not_given_the_clip_is_refused(command):
    with pytest.raises(ValueError, match=r"caption\.command="):
        CommandCaptioner(command, "", 4, 1.0)


def test_a_program_that_is_not_there_says_so(clip):
    with pytest.raises(RowFailed, match="cannot be started"):
        CommandCaptioner(["/no/such/program", "{clip}"], "", 4, 1.0).caption(clip, FRAMES)


# --- The stage ---------------------------------------------------------------------------------------------

COUNTING = """
import sys
open(sys.argv[2], "a").write("x")
print("" if "blank" in sys.argv[1] else " a  moving\\nview ")
"""


def test_captions_are_counted_cached_and_made_anew_for_another_captioner(tmp_path):
    rows = [clip_row(tmp_path, key, panned(speed)) for key, speed in (("one", 10), ("blank", 20), ("two", 30))]
    calls = tmp_path / "calls"

    def run(**settings):
        command = [sys.executable, "-c", COUNTING, "{clip}", str(calls)]
        stage = CaptionWithCommand(command=command, **settings)
        [report] = pipeline(tmp_path, {"caption": stage}, rows, HERE).run(["caption"], show=False)
        return report, [row["caption"] for row in read_rows(tmp_path / "01-caption" / "rows.jsonl")]

    report, captions = run()
    assert (report.kept, report.dropped, captions) == (2, {"empty caption": 1}, ["a moving view"] * 2)
    run(timeout_seconds=30.0)  # another setting, but the same captioner: all is done again, from the cache
    assert calls.read_text() == "x" * 3
    run(prompt="Name the animal.")
    assert calls.read_text() == "x" * 6
    assert run(replace=False)[1] == ["caption of one", "caption of blank", "caption of two"]
    assert calls.read_text() == "x" * 6


def test_failed_captions_are_counted_against_the_limit(tmp_path):
    rows = [clip_row(tmp_path, "one", panned(10)), clip_row(tmp_path, "two", panned(20))]
    script = "import sys; sys.exit(3) if 'two' in sys.argv[1] else print('a view')"
    stage = CaptionWithCommand(command=[sys.executable, "-c", script, "{clip}"])
    run = pipeline(tmp_path, {"caption": stage}, rows, HERE, max_failed_fraction=0.5)
    [report] = run.run(["caption"], show=False)
    assert (report.kept, report.failed) == (1, {"caption command failed": 1})


def test_the_cache_keeps_answers_apart_by_clip_and_captioner(tmp_path):
    CaptionCache(tmp_path, "first").write("ab12", "eine Möwe")
    assert CaptionCache(tmp_path, "first").read("ab12") == "eine Möwe"
    assert CaptionCache(tmp_path, "first").read("ab13") is None
    assert CaptionCache(tmp_path, "second").read("ab12") is None


# --- A vision-language model -------------------------------------------------------------------------------

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}:"
)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A LLaVA with random weights, a few kB, saved as any model is."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = ["<pad>", "<unk>", "</s>", "<image>", ":", "a", "cat", "dog", "runs", "sits", "what", "is", "seen"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", extra_special_tokens={}
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        image_processor, fast, patch_size=14, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **sizes),
        text_config=LlamaConfig(vocab_size=len(words), eos_token_id=2, pad_token_id=0, bos_token_id=None, **sizes),
        image_token_index=3,
    )
    folder = tmp_path_factory.mktemp("model")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_vision_language_model_answers_with_words_of_its_own(tiny_model, clip):
    captioner = VisionLanguageCaptioner(str(tiny_model), "what is seen", 3, max_new_tokens=6, device="cpu")
    said = captioner.caption(clip, FRAMES)
    assert said == captioner.caption(clip, FRAMES)
    assert 0 < len(said.split()) <= 6
    assert "what is seen" not in said
    assert "<image>" not in said


def test_a_model_is_told_from_another_by_its_files(tiny_model):
    def identity(**settings):
        return VisionLanguageCaptioner(str(tiny_model), "what is seen", 3, device="cpu", **settings).identity

    first = identity()
    assert identity() == first
    assert identity(max_new_tokens=9) != first
    config = tiny_model / "generation_config.json"
    content = config.read_text()
    config.write_text(content + " ")
    assert identity() != first
    config.write_text(content)


def test_the_stage_runs_a_model(tiny_model, tmp_path):
    rows = [clip_row(tmp_path, "one", panned(10), caption="")]
    stage = CaptionWithModel(model=str(tiny_model), frames=2, max_new_tokens=4, device="cpu")
    [report] = pipeline(tmp_path, {"caption": stage}, rows, HERE).run(["caption"], show=False)
    [row] = read_rows(tmp_path / "01-caption" / "rows.jsonl")
    assert report.kept == 1
    assert row["caption"]
    assert len(row["captioner"]) == 16


def test_a_folder_without_a_model_is_refused_by_key(tmp_path):
    with pytest.raises(ValueError, match=r"caption\.model=.* cannot be loaded"):
        VisionLanguageCaptioner(str(tmp_path), "", 2)
    with pytest.raises(ValueError, match=r"caption\.model is empty"):
        VisionLanguageCaptioner("", "", 2)
