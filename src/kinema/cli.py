"""The `kinema` command: what surrounds training. Each verb's last line is its verdict."""

import argparse
import os
import sys
from collections.abc import Callable
from importlib import import_module

VERBS: dict[str, tuple[str, str]] = {
    "doctor": ("kinema.doctor.command", "check this machine, and with the words of train.py that job"),
    "data check": ("kinema.data.verbs.check", "count and check the clips of a data set, and draw a contact sheet"),
    "data page": ("kinema.report.data_page", "write the HTML page of a data set, to be looked at before training"),
    "data stats": ("kinema.data.verbs.stats", "count what a data set holds: sizes, durations, licences, sources"),
    "data show": ("kinema.data.verbs.show", "show one clip: its record, its members, its frames"),
    "data diff": ("kinema.data.verbs.diff", "name the clips that two data sets do not share"),
    "data croissant": (
        "kinema.data.verbs.croissant",
        "describe a data set in Croissant's words, for catalogues and loaders",
    ),
    "data index": ("kinema.data.verbs.index", "index the tar shards of a WebDataset that Kinema did not write"),
    "data ledger": (
        "kinema.training.records.seen_table",
        "say which checkpoints of a run saw a source, licence or clip",
    ),
    "data encode": ("kinema.training.encode", "encode clips with a trained VAE into a latent cache"),
    "data encode-text": ("kinema.encode_text", "encode captions with a text encoder into a text cache"),
    "plan": ("kinema.plan", "say what a training command takes: memory of a rank, operations of a step"),
    "checkpoint ls": ("kinema.training.verbs.ls", "list the checkpoints of a run"),
    "checkpoint verify": (
        "kinema.training.verbs.verify",
        "read every byte of a run's checkpoints and check it",
    ),
    "checkpoint fetch": ("kinema.training.verbs.fetch", "bring a run from an address, every byte verified"),
    "checkpoint convert": (
        "kinema.training.verbs.convert",
        "rewrite a checkpoint for so many ranks, or its weights",
    ),
    "checkpoint average": ("kinema.training.verbs.average", "average the weights of several checkpoints"),
    "torchrun": ("kinema.launching", "start ranks as torchrun does, and end with the exit status of the run"),
    "import": ("kinema.interop.importing", "make a Kinema checkpoint of published weights"),
    "export": ("kinema.interop.exporting", "write weights as diffusers or ComfyUI load them, and compare them there"),
    "report": ("kinema.report.page", "write the report page of a run"),
    "evaluate": (
        "kinema.evaluation.captions",
        "measure how well the samples of a toy run follow held-out captions",
    ),
    "first-frame": ("kinema.evaluation.first_frame", "sample held-out clips from their first frames, and measure them"),
}
"""Verb -> module with `add_arguments(parser)` and `run(arguments) -> int`; imported only when it is used."""


def main() -> None:
    """Parse the verb, import its module, run it, and exit with its status."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    words = sys.argv[1:]
    for verb, (module, summary) in VERBS.items():
        parts = verb.split()
        if words[: len(parts)] == parts:
            sys.exit(run_verb(verb, module, summary, words[len(parts) :]))
    group = next((word for word in words[:1] if any(verb.startswith(f"{word} ") for verb in VERBS)), "")
    asked = words[bool(group) :] in ([], ["--help"], ["-h"])
    print(overview(group), file=sys.stdout if asked else sys.stderr)
    sys.exit(0 if asked else 64)


def run_verb(verb: str, module_name: str, summary: str, words: list[str]) -> int:
    """Run one verb; an error that a user can cause becomes one line."""
    from kinema.data.storage.store import StoreDown
    from kinema.exits import Exit

    module = import_module(module_name)
    parser = argparse.ArgumentParser(prog=f"kinema {verb}", description=f"{summary[0].upper()}{summary[1:]}.")
    add_arguments: Callable[[argparse.ArgumentParser], None] = module.add_arguments
    add_arguments(parser)
    try:
        return int(module.run(parser.parse_intermixed_args(words)))  # KEY=VALUE on either side of options
    except StoreDown as error:
        print(f"error: {error}", file=sys.stderr)
        return Exit.unavailable
    except ValueError as error:
        if "KINEMA_TRACEBACK" in os.environ:
            raise
        from kinema.training.checkpoints.store import CheckpointError  # and with it torch

        print(f"error: {error}", file=sys.stderr)
        return Exit.checkpoint if isinstance(error, CheckpointError) else Exit.configuration


def overview(group: str = "") -> str:
    """What the command offers, all of it or the verbs that begin with one word."""
    lines = [f"  kinema {verb:<18} {summary}" for verb, (_, summary) in VERBS.items() if verb.startswith(group)]
    return "\n".join(["usage: kinema VERB [options]      (kinema VERB --help for the options)", "", *lines])


if __name__ == "__main__":
    main()
