# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""An extension of griffe that reads docstrings in Hugging Face's style for the API reference (see mkdocs.yml)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

_REFERENCE = re.compile(r"\[`~?(\w+)(\.\w+)?`\](?![\[(])")


class HuggingFaceDocstrings(griffe.Extension):
    """Turns [`Name`] into a link to a public name, and (`type`, *optional*, defaults to x) into a plain type."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        public = {str(name) for name in pkg.exports or ()}

        def link(match: re.Match[str]) -> str:
            name, member = match[1], match[2] or ""
            text = f"`{member.removeprefix('.') or name}`"
            return f"[{text}][{pkg.path}.{name}{member}]" if name in public else text

        for docstring in _docstrings(pkg):
            docstring.value = _REFERENCE.sub(link, docstring.value)
            for section in docstring.parsed:
                if section.kind in (griffe.DocstringSectionKind.parameters, griffe.DocstringSectionKind.returns):
                    for item in section.value:
                        if isinstance(item.annotation, str):
                            item.annotation = _plain_type(item.annotation, getattr(item, "default", None) is not None)


def _docstrings(module_or_class: griffe.Object) -> Iterator[griffe.Docstring]:
    if module_or_class.docstring:
        yield module_or_class.docstring
    for member in module_or_class.members.values():
        if not member.is_alias:
            yield from _docstrings(member)


def _plain_type(annotation: str, has_default: bool) -> str:
    """Without markup, and without the default where the signature has it, which the reference shows anyway."""
    if has_default:
        annotation = re.sub(r", (\*optional\*|defaults to .*)", "", annotation)
    annotation = re.sub(r"\[(`.+?`)\]\[.+?\]", r"\1", annotation)
    return annotation.replace("`", "").replace("*optional*", "optional")
