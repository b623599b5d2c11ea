# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The remote-code edition of a model: a folder that loads where this package is not installed.

Both libraries run code of a repository if the caller passes `trust_remote_code=True`. Each takes it in another form:

- transformers copies the module that `auto_map` in `config.json` names, and follows its imports of the form
  `from .x import y`. A tokenizer therefore carries the modules of this package as they are.
- diffusers downloads one file for each component. Such a file carries all modules that the class needs, as text. When
  it runs, it writes them into the cache of remote code as a package, and imports the class from there. The name of
  that package holds a hash of this library, so that all files of one edition share one set of classes.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from .file_checks import CONFIG_FILE, PIPELINE_INDEX, read_json, shown
from .model_cards import front_matter, remote_code_section
from .pushing import CARD, add_card, upload

LIBRARY = "gpstoken_hf"
FOLDER = Path(__file__).parent
PIPELINE_FILE, PROCESSOR_CONFIG = "pipeline.py", "preprocessor_config.json"
TOKENIZER_CLASSES = {
    "AutoConfig": ("configuration_gpstoken", "GPSTokenConfig"),
    "AutoModel": ("modeling_gpstoken", "GPSTokenModel"),
}
PROCESSOR_CLASSES = {"AutoImageProcessor": ("image_processing_gpstoken", "GPSTokenImageProcessor")}
# Classes that `diffusers.AutoModel` loads, and their modules.
DIFFUSERS_MODELS = {
    "SiTTransformer1DModel": "transformer_sit",
    "AutoencoderGPSToken": "autoencoder_gpstoken",
    "GaussianLayoutBank": "layout_bank",
}
PIPELINE_CLASS = ("pipeline_gpstoken", "GPSTokenPipeline")
# Files of a model. Everything else in its folder, code above all, is left behind.
COPIED = (".json", ".safetensors", ".md", ".png", ".jpg", ".svg")

# What ends the text of the modules in a file.
QUOTES = "'" * 3
ONE_FILE = """\
# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
# {class_name} for processes without the package gpstoken_hf.
#
# diffusers downloads one file of code for each component. This one carries the modules that the class needs as text,
# with `| ` before each line, writes them into the cache of remote code as the package `{package}`, and imports them.

import importlib
import os
import sys
import tempfile
from pathlib import Path

import diffusers
from diffusers.utils import HF_MODULES_CACHE

PACKAGE = "{package}"
MODULES = r{quotes}
{modules}{quotes}


def install():
    folder = Path(HF_MODULES_CACHE) / PACKAGE
    folder.mkdir(parents=True, exist_ok=True)
    for section in MODULES.split("\\n==== ")[1:]:
        name, *lines = section.removesuffix("\\n").split("\\n")
        source = "".join(line[2:] + "\\n" for line in lines).encode()
        path = folder / f"{{name}}.py"
        if not path.is_file() or path.read_bytes() != source:
            # Another process may be reading the file: it is replaced in one step.
            handle, staging = tempfile.mkstemp(dir=folder)
            with os.fdopen(handle, "wb") as file:
                file.write(source)
            os.replace(staging, path)
    if str(HF_MODULES_CACHE) not in sys.path:
        sys.path.append(str(HF_MODULES_CACHE))
    importlib.invalidate_caches()


{imports}
"""
IMPORT = """\
install()
{class_name} = importlib.import_module(f"{{PACKAGE}}.{module}").{class_name}"""
IMPORT_PIPELINE = """\
# Where the package is imported, diffusers takes the components from it, so the pipeline comes from it too.
{class_name} = getattr(diffusers, "{class_name}", None)
if {class_name} is None:
    install()
    {class_name} = importlib.import_module(f"{{PACKAGE}}.{module}").{class_name}"""


def export_remote_code(
    source: Any,
    folder: str | os.PathLike[str],
    repo_id: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
) -> Path:
    """Write the remote-code edition of a model or pipeline, which loads without this package.

    It loads with `trust_remote_code=True` in a process that has transformers, diffusers, torch and torchvision: a
    tokenizer through `AutoConfig`, `AutoModel` and `AutoImageProcessor` of transformers; a [`SiTTransformer1DModel`],
    an [`AutoencoderGPSToken`] or a [`GaussianLayoutBank`] through `diffusers.AutoModel`; a pipeline through
    `DiffusionPipeline`. Where this package is installed, its classes load the edition without running its code.

    Args:
        source (model, pipeline, `str` or `os.PathLike`): a model or pipeline of this package, or a pipeline of
            diffusers with a component of this package inside; or the folder that one was saved to.
        folder (`str` or `os.PathLike`): where to write the edition. It must not exist, or be empty.
        repo_id (`str`, *optional*): a repository to upload it to, as `owner/name`. A model card that is there is kept.
        private (`bool`, *optional*): whether a new repository is private.
        token (`str` or `bool`, *optional*): access token of the Hub.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: if `source` holds nothing of this package that a library loads; if `folder` is not empty.
        OSError: if the Hub cannot be reached or refuses the upload.

    Examples:
        ```python
        >>> import tempfile
        >>> from pathlib import Path
        >>> from gpstoken_hf import bundled
        >>> from gpstoken_hf.hub import export_remote_code

        >>> folder = export_remote_code(bundled("gpstoken-digits"), Path(tempfile.mkdtemp()) / "digits")
        >>> (folder / "pipeline.py").is_file()
        True

        ```
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder must not exist or be empty, got {folder}")
    is_folder = isinstance(source, str | os.PathLike)
    if not is_folder and not hasattr(source, "save_pretrained"):
        raise ValueError(f"source must be a model, a pipeline or a folder, got {type(source).__name__}")
    if is_folder:
        _check_folder(Path(source))
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A failure leaves no half of an edition behind.
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        staging = Path(temporary) / "edition"
        if is_folder:
            _copy(Path(source), staging)
        else:
            source.save_pretrained(staging)
            _check_folder(staging)
        _add_model_card(source, staging, repo_id)
        example = _add_code(staging)
        card = staging / CARD
        text = card.read_text(encoding="utf-8")
        if "trust_remote_code" not in text:
            card.write_text(text + remote_code_section(example, repo_id), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        staging.replace(folder)
    if repo_id is not None:
        upload(folder, repo_id, private=private, token=token)
    return folder


def _class(module: str, class_name: str) -> Any:
    return getattr(importlib.import_module(f".{module}", __package__), class_name)


def _add_model_card(source: Any, folder: Path, repo_id: str | None) -> None:
    """Write a card into the folder unless it has one: that of the model, or a short one for a foreign pipeline."""
    if isinstance(source, str | os.PathLike) and not (folder / CARD).exists():
        kind = _kind(folder)
        if kind is not None:
            source = _class(*kind).from_pretrained(folder)
    add_card(source, folder, repo_id)
    if not (folder / CARD).exists():
        name = read_json(folder / PIPELINE_INDEX).get("_class_name")
        text = f"{front_matter('diffusers', [])}\n# {name} with components of gpstoken-hf\n"
        (folder / CARD).write_text(text, encoding="utf-8")


def _kind(folder: Path) -> tuple[str, str] | None:
    """Module and class of what a folder holds; `None` for a pipeline of diffusers."""
    index = folder / PIPELINE_INDEX
    if index.is_file():
        name = read_json(index).get("_class_name")
        return PIPELINE_CLASS if PIPELINE_CLASS[1] in (name, *(name if isinstance(name, list) else ())) else None
    config = read_json(folder / CONFIG_FILE)
    if config.get("model_type") == "gpstoken":
        return TOKENIZER_CLASSES["AutoModel"]
    return DIFFUSERS_MODELS[config["_class_name"]], config["_class_name"]


def module_closure(names: Iterable[str]) -> list[str]:
    """The modules of this package that some of them import, directly or not, and these themselves; sorted.

    Args:
        names (`Iterable[str]`): names of modules, such as `"modeling_gpstoken"`.
    """
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            tree = ast.parse(_source(name))
            imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level)
            waiting += [node.module for node in imports if node.module]
    return sorted(found)


@cache
def _source(name: str) -> str:
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8")


@cache
def _package() -> str:
    """The name of the package that files of this edition write: a hash of the library, so that versions never mix."""
    sources = "".join(f"{path.stem}\n{path.read_text(encoding='utf-8')}" for path in sorted(FOLDER.glob("*.py")))
    return f"{LIBRARY}_{hashlib.sha256(sources.encode()).hexdigest()[:12]}"


def _one_file(module: str, class_name: str, imports: str = IMPORT) -> str:
    sections = []
    for name in module_closure([module]):
        source = _source(name)
        if QUOTES in source:
            raise ValueError(f"{name}.py must not contain {QUOTES}, which ends the text of the modules, got one")
        lines = source.removesuffix("\n").split("\n")
        sections.append("\n".join([f"==== {name}", *(f"| {line}" if line else "|" for line in lines), ""]))
    return ONE_FILE.format(
        class_name=class_name,
        package=_package(),
        quotes=QUOTES,
        modules="".join(sections),
        imports=imports.format(module=module, class_name=class_name),
    )


def _check_folder(folder: Path) -> None:
    """Raise a ValueError for a folder without anything of this package that the libraries load."""
    if (folder / PIPELINE_INDEX).is_file():
        index = read_json(folder / PIPELINE_INDEX)
        if not _components(index):
            raise ValueError(f"{folder} must hold a pipeline with a component of {LIBRARY}, got none")
        return
    config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    kind = config.get("_class_name", config.get("model_type"))
    if kind not in (*DIFFUSERS_MODELS, "gpstoken"):
        raise ValueError(
            f"{folder} must hold a pipeline, a tokenizer or a model of {LIBRARY} ({', '.join(DIFFUSERS_MODELS)}), "
            f"got {'no config.json' if not config else shown(kind)}"
        )


def _components(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Name of each component of this package -> its module and class."""
    found = {}
    for name, value in index.items():
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and isinstance(value[0], str):
            package, _, module = value[0].rpartition(".")
            if package == LIBRARY and (FOLDER / f"{module}.py").is_file():
                found[name] = (module, value[1])
    return found


def _copy(source: Path, folder: Path) -> None:
    """Copy what belongs to a model: no code, no hidden files."""
    for path in sorted(source.rglob("*")):
        part = path.relative_to(source)
        if path.is_file() and path.suffix in COPIED and not any(name.startswith(".") for name in part.parts):
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / part)


def _add_code(folder: Path) -> str:
    """Add code and what leads to it. Returns the name of the class that the model card shows how to load."""
    index = folder / PIPELINE_INDEX
    if index.is_file():
        config = read_json(index)
        for name, (module, class_name) in _components(config).items():
            (folder / name / f"{LIBRARY}.{module}.py").write_text(_one_file(module, class_name), encoding="utf-8")
        if _kind(folder) == PIPELINE_CLASS:
            (folder / PIPELINE_FILE).write_text(_one_file(*PIPELINE_CLASS, IMPORT_PIPELINE), encoding="utf-8")
            _write_json(index, config | {"_class_name": [Path(PIPELINE_FILE).stem, PIPELINE_CLASS[1]]})
        return "DiffusionPipeline"
    config = read_json(folder / CONFIG_FILE)
    if config.get("model_type") == "gpstoken":
        classes = TOKENIZER_CLASSES | PROCESSOR_CLASSES
        entries = {module for module, _ in classes.values()}
        for name in module_closure(entries):
            source = _source(name)
            if name in entries:
                source += _import_all(name)
            (folder / f"{name}.py").write_text(source, encoding="utf-8")
        _write_json(folder / CONFIG_FILE, config | {"auto_map": _auto_map(TOKENIZER_CLASSES)})
        processor = folder / PROCESSOR_CONFIG
        if not processor.is_file():
            _class(*PROCESSOR_CLASSES["AutoImageProcessor"])().save_pretrained(folder)
        _write_json(processor, read_json(processor) | {"auto_map": _auto_map(PROCESSOR_CLASSES)})
        return "GPSTokenModel"
    class_name = config["_class_name"]
    module = DIFFUSERS_MODELS[class_name]
    (folder / f"{module}.py").write_text(_one_file(module, class_name), encoding="utf-8")
    _write_json(folder / CONFIG_FILE, config | {"auto_map": _auto_map({"AutoModel": (module, class_name)})})
    return class_name


def _import_all(name: str) -> str:
    """Lines that import every module that a module needs: transformers 5.4 copies no others out of a folder."""
    needed = [other for other in module_closure([name]) if other != name]
    return "".join(["\n", *(f"from .{other} import __name__ as _  # noqa: E402, F401\n" for other in needed)])


def _auto_map(classes: dict[str, tuple[str, str]]) -> dict[str, str]:
    return {auto_class: f"{module}.{class_name}" for auto_class, (module, class_name) in classes.items()}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
