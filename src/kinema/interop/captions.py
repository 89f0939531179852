"""How each published pipeline encodes captions: facts of its release that none of its files says."""

from kinema.conditioning.text import CombinedText, PretrainedText, TextCleaning, TextFamily, TextPadding

T5 = "google/t5-v1_1-xxl"

HUNYUAN_VIDEO_TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
"""The beginning-of-text token comes from the tokenizer."""

HUNYUAN_VIDEO_15_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant. Describe the video by detailing the following aspects: "
    "        1. The main content and theme of the video. "
    "        2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects. "
    "        3. Actions, events, behaviors temporal relationships, physical movement changes of the objects. "
    "        4. background environment, light, style and atmosphere. "
    "        5. camera angles, movements, and transitions used in the video.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""The model was trained with these runs of blanks."""

WAN = PretrainedText(
    path="google/umt5-xxl",
    family=TextFamily.umt5,
    max_tokens=512,
    padding=TextPadding.zeros,
    cleaning=TextCleaning.web,
)
COGVIDEOX = PretrainedText(path=T5, max_tokens=226, padding=TextPadding.encoded)
LTX_VIDEO = PretrainedText(path=T5, max_tokens=128, padding=TextPadding.overheard)
LTX_CONDITION = PretrainedText(path=T5, max_tokens=256)
MOCHI = PretrainedText(path=T5, max_tokens=256)
LATTE = PretrainedText(path=T5, max_tokens=120, cleaning=TextCleaning.lower)
COSMOS = PretrainedText(path="google-t5/t5-11b", max_tokens=512, padding=TextPadding.zeros)
HUNYUAN_VIDEO = CombinedText(
    tokens=PretrainedText(
        path="hunyuan-video/text_encoder",
        family=TextFamily.llama,
        max_tokens=256,
        template=HUNYUAN_VIDEO_TEMPLATE,
        crop=95,
        layer=-3,
    ),
    pooled=PretrainedText(path="openai/clip-vit-large-patch14", family=TextFamily.clip, max_tokens=77),
)
HUNYUAN_VIDEO_15 = CombinedText(
    tokens=PretrainedText(
        path="hunyuan-video-1.5/text_encoder",
        family=TextFamily.qwen,
        max_tokens=1000,
        blank=" ",
        template=HUNYUAN_VIDEO_15_TEMPLATE,
        crop=108,
        layer=-3,
    ),
    glyphs=PretrainedText(path="google/byt5-small", max_tokens=256),
)

CAPTIONS: dict[str, PretrainedText | CombinedText] = {
    "WanPipeline": WAN,
    "WanImageToVideoPipeline": WAN,
    "WanVACEPipeline": WAN,
    "CogVideoXPipeline": COGVIDEOX,
    "CogVideoXImageToVideoPipeline": COGVIDEOX,
    "LTXPipeline": LTX_VIDEO,
    "LTXImageToVideoPipeline": LTX_VIDEO,
    "LTXConditionPipeline": LTX_CONDITION,
    "MochiPipeline": MOCHI,
    "LattePipeline": LATTE,
    "Cosmos2TextToImagePipeline": COSMOS,
    "Cosmos2VideoToWorldPipeline": COSMOS,
    "HunyuanVideoPipeline": HUNYUAN_VIDEO,
    "HunyuanVideo15Pipeline": HUNYUAN_VIDEO_15,
    "HunyuanVideo15ImageToVideoPipeline": HUNYUAN_VIDEO_15,
}
"""Pipeline class of the reference -> its policy; `path` says where the encoder is published, or what it is called."""
