"""What holds everywhere in the code: style, types, the direction of imports, and ways never taken."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LARGEST_TRACKED_MIB = 1
VAE_SCALINGS = (0.18215, 0.13025)  # of Stable Diffusion and SDXL: scaling belongs to the VAE's own statistics
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib"}


def run(*command):
    """Runs a checker from the repository's root with `src` on the path."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    cut = [f"... and {len(lines) - 60} more lines"] if len(lines) > 60 else []
    assert done.returncode == 0, "\n".join([" ".join(command), *lines[:60], *cut])


def program(name):
    """A console script of this very environment."""
    path = Path(sys.executable).with_name(name)
    return str(path) if path.exists() else shutil.which(name) or pytest.fail(f"{name} is missing: make setup")


def tracked():
    """Files of the repository, new ones included; None outside a checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    if done.returncode:
        return None
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def sources(*suffixes):
    folders = ("src", "data_prep", "tests", "configs", "benchmarks", "launch", "examples")
    everything = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    everything += list(ROOT.glob("*"))
    return [path for path in everything if path.suffix in suffixes and path != Path(__file__)]


def name_of(node):
    """`torch.load` of the call torch.load(...)."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed([*parts, node.id])) if isinstance(node, ast.Name) else parts[0] if parts else ""


def has_keyword(call, name, value):
    return any(
        keyword.arg == name and isinstance(keyword.value, ast.Constant) and keyword.value.value is value
        for keyword in call.keywords
    )


def wrong_ways(text):
    """Line and name of each construct that this project never uses."""
    found = []
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Call() if name_of(node.func) == "torch.load" and not has_keyword(node, "weights_only", True):
                found.append((node.lineno, "torch.load without weights_only=True"))
            case ast.Call() if name_of(node.func) != "zip" and has_keyword(node, "strict", False):
                found.append((node.lineno, "strict=False"))
            case ast.Import() if {alias.name.split(".")[0] for alias in node.names} & PICKLES:
                found.append((node.lineno, "pickle"))
            case ast.ImportFrom() if node.level == 0 and (node.module or "").split(".")[0] in PICKLES:
                found.append((node.lineno, "pickle"))
            case ast.ExceptHandler(type=None):
                found.append((node.lineno, "bare except"))
            case ast.Constant(value=float() as value) if value in VAE_SCALINGS:
                found.append((node.lineno, f"VAE scaling constant {value}"))
    return found


def test_ruff_finds_nothing():
    run(sys.executable, "-m", "ruff", "check", "--quiet", "--output-format=concise", ".")


def test_code_is_formatted():
    run(sys.executable, "-m", "ruff", "format", "--check", "--quiet", ".")


def test_types_agree():
    run(sys.executable, "-m", "mypy")


def test_imports_point_down():
    run(program("lint-imports"))


def test_no_wrong_ways():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in sources(".py")
        for line, what in wrong_ways(path.read_text(encoding="utf-8"))
        if what != "pickle" or ROOT / "tests" not in path.parents  # a test may send an object through a pipe
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "model.load_state_dict(state, strict=False)",
        "import pickle",
        "from pickle import loads",
        "try:\n    pass\nexcept:\n    pass",
        "latents = latents * 0.18215",
    ],
)
def test_each_wrong_way_would_be_found(text):
    assert wrong_ways(text)


def test_allowed_ways_pass():
    assert not wrong_ways("torch.load(path, weights_only=True)\nzip(a, b, strict=False)\njson.loads(text)")


def test_configs_name_no_classes_to_build_and_no_scaling():
    for path in sources(".yaml", ".yml"):
        text = path.read_text(encoding="utf-8")
        assert "_target_" not in text, f"{path}: a config is data; the dataclass it fills says what is built"
        assert not re.search(r"\b0\.(18215|13025)\b", text), f"{path}: scaling belongs to the VAE's statistics"


def dependency_tree(roots):
    """Installed packages that the requirements reach, by their canonical names."""
    reached, waiting = set(), list(roots)
    while waiting:
        requirement = waiting.pop()
        extras = requirement.extras or {""}
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            continue
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in reached:
            continue
        reached.add((name, frozenset(requirement.extras)))
        try:
            children = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for line in children:
            child = Requirement(line)
            if child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in extras):
                child.marker = None
                waiting.append(child)
    return {name for name, _ in reached}


def test_no_torchvision_in_the_dependency_tree():
    """Beside a CPU build of torch its presence breaks importing transformers and peft."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    tree = dependency_tree([Requirement(line) for line in lines])
    assert {
        "torch",
        "transformers",
        "filelock",
    } <= tree  # filelock only through others: the walk really walks
    assert "torchvision" not in tree


def test_no_large_file_is_tracked():
    files = tracked()
    if files is None:
        pytest.skip("not a git checkout")
    large = {path.relative_to(ROOT): path.stat().st_size for path in files}
    large = {path: size for path, size in large.items() if size > LARGEST_TRACKED_MIB * 2**20}
    assert not large, f"larger than {LARGEST_TRACKED_MIB} MiB: {large}"
