"""What is installed, and what an import of it brings along."""

import email
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
EPOCH = "1700000000"
"""SOURCE_DATE_EPOCH of every build: what stands for the time in the archives."""

# The whole of the CPU path, in a process that has no triton.
USE_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
before = set(sys.modules)
import novolstm_triton
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert new.isdisjoint({"typer", "matplotlib", "numpy", "tqdm", "safetensors", "h5py", "transformers"}), new
layer = novolstm_triton.NovoLSTM(3, 4)
layer(torch.randn(5, 2, 3))[0].sum().backward()
assert layer.weight_hh_l0.grad.abs().sum() > 0
print(novolstm_triton.__file__)
"""


def python(code: str, cwd: pathlib.Path, path: pathlib.Path | None = None) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter, with `path` first on its module path."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    """Return a copy of the checkout, for builds to write to."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "novolstm-run*")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    environment = os.environ | {"SOURCE_DATE_EPOCH": EPOCH}
    result = subprocess.run([*command, "-w", str(folder), str(source)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_package_and_the_kernels_inside_it(wheel):
    package, kernels = ROOT / "novolstm_triton", ROOT / "kernels"
    files = [*package.rglob("*.py"), package / "py.typed", *(package / "plans" / "data").iterdir()]
    expected = {f"novolstm_triton/{path.relative_to(package)}" for path in files}
    expected |= {f"novolstm_triton/kernels/{path.name}" for path in (*kernels.glob("*.py"), kernels / "README.md")}
    assert {"novolstm_triton/testing/cooperative.py", "novolstm_triton/kernels/forward.py"} <= expected
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    about = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    assert names - about == expected
    told = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    assert {name.partition("/")[2] for name in about} == told


def test_metadata_names_the_licence_and_the_dependencies(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
        licence = archive.read(name.replace("METADATA", "licenses/LICENSE"))
    # An expression of SPDX, which metadata has from version 2.4 on.
    assert tuple(map(int, metadata["Metadata-Version"].split("."))) >= (2, 4)
    assert (metadata["License-Expression"], metadata.get_all("License-File")) == ("MIT", ["LICENSE"])
    assert metadata["License"] is None
    assert not [c for c in metadata.get_all("Classifier", []) if c.startswith("License")]
    assert licence == (ROOT / "LICENSE").read_bytes()
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(re.split(r"[<>=; ]", line)[0] for line in needed) == ["torch", "triton"]


def test_sdist_builds_the_same_wheel_and_brings_the_tests(source, wheel, tmp_path, monkeypatch):
    """The same bit for bit, in another folder, at another time, from files of another age."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", EPOCH)
    code = "import sys; from setuptools import build_meta as b; print(b.build_{}(sys.argv[1]))"
    build = [sys.executable, "-c", code.format("sdist"), str(tmp_path)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / path.name.removesuffix(".tar.gz")
    files = (
        "tests/support/seeded_faults.py",
        "tests/data/README.md",
        "bench/compile_report.py",
        "mkdocs.yml",
        "docs/index.md",
    )
    for name in (*files, "kernels/README.md"):
        assert (unpacked / name).is_file(), name
    build = [sys.executable, "-c", code.format("wheel"), str(tmp_path)]
    subprocess.run(build, cwd=unpacked, check=True, capture_output=True)
    (rebuilt,) = tmp_path.glob("*.whl")
    assert hashlib.sha256(rebuilt.read_bytes()).digest() == hashlib.sha256(wheel.read_bytes()).digest()


def test_installed_package_works_without_triton(wheel, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    # From the checkout's root: what is installed comes before what lies there.
    code = "import sys; sys.path.remove('')\n" + USE_WITHOUT_TRITON
    result = python(code, ROOT, tmp_path)
    assert result.returncode == 0, result.stderr
    assert pathlib.Path(result.stdout.strip()) == tmp_path / "novolstm_triton" / "__init__.py"


def test_checkout_works_without_triton_and_says_so_if_asked_for_it():
    code = USE_WITHOUT_TRITON + "layer.backend = 'triton'; layer(torch.randn(5, 2, 3))"
    result = python(code, ROOT)
    assert result.stdout.strip() == str(ROOT / "novolstm_triton" / "__init__.py"), result.stderr
    assert result.returncode != 0
    assert "backend 'triton' needs" in result.stderr


def test_kernels_is_no_package_of_its_own():
    result = python("import kernels", ROOT)
    assert result.returncode != 0
    assert "this folder is the package novolstm_triton.kernels and was imported as 'kernels'" in result.stderr
