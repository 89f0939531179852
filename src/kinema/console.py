"""How a script meets its user: errors in one line that says what to type, and exit statuses with one meaning each."""

import atexit
import dataclasses
import difflib
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kinema.exits import Exit
from kinema.launching import FOLDER, final_status, leave_status


def run_script(main: Callable[[], Any], config_name: str, configs: Path | None = None) -> None:
    """Run a Hydra script so that its errors reach the user whole and in one line.

    Its configs lie in `configs`, by default beside the script.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # otherwise Hydra prints errors of its own and hides the cause
    try:
        main()
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # Hydra raises plain ValueErrors too
        told = missing_key(error) or f"{first_cause(error)} {_suggestions(config_name, configs)}".strip()
        fail(told, Exit.configuration)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def leave_with_status(script: Callable[[], None]) -> None:
    """Run the script and end this process with its status; with several ranks, before libraries are taken down.

    When a process ends in the usual way, C++ libraries destroy what they hold while their threads may still run, and
    one thread that was not joined aborts the process ("terminate called without an active exception"). A launcher
    then reports a rank that had finished as failed. What Python itself has to do is done: tracebacks, functions
    registered with `atexit` (Weights & Biases, worker processes, logging), and the streams.
    """
    if not _several_ranks() and FOLDER not in os.environ:
        script()
        return
    before = final_status()
    status = _status(script) if before is None else before
    leave_status(status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _status(script: Callable[[], None]) -> int:
    """What the interpreter would leave with after running this."""
    try:
        script()
    except SystemExit as request:
        if request.code is None or isinstance(request.code, int):
            return request.code or 0
        print(request.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def explain_errors(main: Callable[..., int | None]) -> Callable[..., None]:
    """Turn errors that a user can cause into one line and an exit status; show the rest as they are."""

    @functools.wraps(main)
    def explained(*arguments: Any) -> None:
        from kinema.data.account.ledger import DataBudgetError
        from kinema.data.storage.store import StoreDown
        from kinema.distributed.process import RanksMissing
        from kinema.distributed.rendezvous import UnsafeRendezvousError
        from kinema.training.alive.guard import NonFiniteLoss
        from kinema.training.checkpoints.store import CheckpointError, NotSavedError
        from kinema.training.preflight import PreflightFailed

        try:
            sys.exit(main(*arguments) or 0)
        except DataBudgetError as error:
            fail(str(error), Exit.data)
        except StoreDown as error:
            fail(str(error).rpartition("StoreDown: ")[2].strip(), Exit.unavailable)  # a worker adds its traceback
        except RanksMissing as error:
            fail(str(error), Exit.unavailable)
        except NotSavedError as error:
            fail(str(error), Exit.io)
        except CheckpointError as error:
            fail(str(error), Exit.checkpoint)
        except NonFiniteLoss as error:
            fail(str(error), Exit.unsound)
        except PreflightFailed as error:
            fail(f"preflight: {error} preflight.steps=0 trains unchecked.", Exit.preflight)
        except UnsafeRendezvousError as error:
            fail(str(error), Exit.unsafe)
        except RuntimeError as error:
            if not is_lost_rank(error):
                raise
            fail(f"another rank has ended or does not answer: {first_line(error)}", Exit.unavailable)
        except ValueError as error:
            if "KINEMA_TRACEBACK" in os.environ:
                raise
            fail(str(error), Exit.configuration)

    return explained


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because of another rank or the network, as gloo, NCCL and the store word it."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo/", "[Rank", "NCCL"))


def first_line(error: Exception) -> str:
    """What an exception says, without the stack that some libraries add."""
    return str(error).strip().partition("\n")[0]


def fail(message: str, status: int) -> None:
    """One line on stderr, with the rank where there are several, and out."""
    rank = f" (rank {os.environ['RANK']})" if _several_ranks() else ""
    tqdm.write(f"error{rank}: {message}", file=sys.stderr)  # not behind a progress bar
    sys.stderr.flush()
    sys.exit(status)


def _several_ranks() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def missing_key(error: BaseException) -> str:
    """What is wrong with a key that a group does not have, and what to type; nothing for other errors."""
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, ValidationError

    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, ValidationError) and "dict is not a subclass of" in str(error):
        new = error.full_key
        return f"{new} is new and is given whole: '+...={{{new}:{{key:value}}}}', not '+...{new}.key=value'."
    if not isinstance(error, (ConfigAttributeError, ConfigKeyError)) or error.full_key is None:
        return ""
    parent, _, key = error.full_key.rpartition(".")
    if dataclasses.is_dataclass(error.object_type):
        known = [field.name for field in dataclasses.fields(error.object_type)]
    else:
        known = [str(name) for name in error.parent_node or ()]
    told = f"{error.full_key}: there is no such key."
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        told += f" Did you mean {parent}.{near[0]}?" if parent else f" Did you mean {near[0]}?"
    elif known:
        told += f" There are: {', '.join(known)}."
    if error.object_type is dict:
        told += f" A new one is given whole: '+{parent}={{{key}:{{...}}}}'."
    return told


def first_cause(error: BaseException) -> str:
    """The message of the innermost exception, in one line that names the key."""
    from omegaconf.errors import OmegaConfBaseException

    while error.__cause__ is not None:
        error = error.__cause__
    message = str(error).strip()
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {message.splitlines()[0]}."
    return message


def _suggestions(config_name: str, configs: Path | None) -> str:
    """What to type instead, for each override whose key does not exist or whose group is set to null."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from kinema.config import suggestion

    GlobalHydra.instance().clear()
    configs = configs or Path(sys.argv[0]).resolve().parent / "configs"
    overrides = [argument.lstrip("+~").split("=", 1) for argument in sys.argv[1:] if "=" in argument]
    with initialize_config_dir(str(configs), version_base="1.3"):
        plain = compose(config_name)
    hints = [
        f"Quote {key} twice: {key}=\"'...'\"." for key, value in overrides if "," in value and value[0] not in "[{'\""
    ]
    hints += [suggestion(key, plain) for key, _ in overrides if "/" not in key]
    for key, value in overrides:
        if value == "null" and (configs / key).is_dir():
            hints.append(f"{key}=null: choose one of {', '.join(sorted(f.stem for f in (configs / key).iterdir()))}.")
    return " ".join(filter(None, hints))
