# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The partition inside worker processes, with compile caches that are shared, empty or impossible."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpstoken_hf
from gpstoken_hf import partition_images

NUM_IMAGES = 8


class Partitions(torch.utils.data.Dataset):
    """Boxes of seeded random images, partitioned where the item is fetched."""

    def __len__(self):
        return NUM_IMAGES

    def __getitem__(self, index):
        images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(index)) * 2 - 1
        return partition_images(images, 32).boxes


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_dataloader_workers(context):
    if context not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {context} here")
    dataset = Partitions()
    # Threads in the parent first: a forked worker must not inherit a pool without threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = torch.stack([dataset[index] for index in range(NUM_IMAGES)])
        loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context=context)
        assert torch.equal(torch.cat(list(loader)), expected)
    finally:
        torch.set_num_threads(threads)


PROGRAM = """
import torch
from installed import complexity_cpu
from installed.partition import partition_images
loops = [value for value in vars(complexity_cpu).values() if hasattr(value, "signatures")]
assert len(loops) > 5 and not any(loop.signatures for loop in loops), "the import has compiled something"
images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
print(partition_images(images, 32).boxes.sum((0, 1)).tolist())
"""


def expected_line():
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return str(partition_images(images, 32).boxes.sum((0, 1)).tolist())


def run(num_processes, environment, cwd):
    """Output lines of so many processes that partition the same image at the same time."""
    processes = [
        subprocess.Popen(
            # What a dependency deprecates is no error of ours.
            [sys.executable, "-Werror", "-Wdefault::DeprecationWarning", "-Wdefault::FutureWarning", "-c", PROGRAM],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(num_processes)
    ]
    try:
        outputs = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(processes, outputs):
        assert process.returncode == 0, errors
    return [lines.strip() for lines, _ in outputs]


def copy_of_the_partition(folder):
    """A package with the partition alone, so that its own cache folder can be tampered with."""
    package = folder / "installed"
    package.mkdir()
    (package / "__init__.py").write_text("")
    library = Path(gpstoken_hf.__file__).parent
    names = ("file_checks", "gaussians", "layout", "numba_support", "partition", "regions", "triton_support")
    for module in (*names, *(path.stem for path in library.glob("complexity_*.py"))):
        shutil.copy(library / f"{module}.py", package)
    return package


def test_processes_that_fill_one_empty_cache_at_the_same_time(tmp_path):
    copy_of_the_partition(tmp_path)
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert run(2, environment, tmp_path) == [expected_line()] * 2
    assert list((tmp_path / "cache").rglob("*.nbc"))
    # And one that finds it filled.
    assert run(1, environment, tmp_path) == [expected_line()]


def test_installation_without_any_place_for_a_cache(tmp_path):
    package = copy_of_the_partition(tmp_path)
    # A file where the folder would go: this stops a superuser too, whom permissions do not stop.
    (package / "__pycache__").write_text("")
    nowhere = str(package / "__pycache__" / "home")
    environment = {"HOME": nowhere, "XDG_CACHE_HOME": nowhere, "NUMBA_CACHE_DIR": nowhere}
    assert run(1, environment, tmp_path) == [expected_line()]
    assert not list(tmp_path.rglob("*.nbc"))
