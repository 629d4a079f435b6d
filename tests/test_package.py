"""The wheel and the sdist hold everything that a user needs."""

import tarfile
import zipfile
from pathlib import Path

from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]


def files_below(folder, pattern):
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)}


def test_a_wheel_holds_the_package_the_kernels_and_the_job_files(tmp_path):
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert files_below("ltx_titan", "*.py") <= names
    assert {name.replace("kernels/", "ltx_titan_kernels/", 1) for name in files_below("kernels", "*.py")} <= names
    assert {f"ltx_titan/{name}" for name in files_below("train_configs", "*.toml")} <= names
    assert {"ltx_titan/assets/big_buck_bunny_5s.mp4", "ltx_titan/py.typed"} <= names
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "train_configs/"))]


def test_an_sdist_holds_what_the_tests_need(tmp_path):
    (sdist,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert files_below("tests", "*.py") <= names
    assert {"README.md", "LICENSE", "run_train.sh", "tests/run.sh", "docs/configuration.md"} <= names
