# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Class labels of a generator: names and ids as a caller gives them -> ids."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch

Labels: TypeAlias = int | str | Sequence[int | str] | torch.Tensor


def ids_by_name(id2label: Mapping | None) -> dict[str, list[int]]:
    """Class name in lower case -> the ids that carry it. Names count as a whole and split at commas.

    Args:
        id2label (`Mapping`, *optional*): class id -> name, or several names separated by commas.
    """
    names: dict[str, list[int]] = {}
    for key, label in (id2label or {}).items():
        for name in dict.fromkeys([label, *label.split(",")]):
            names.setdefault(name.strip().casefold(), []).append(int(key))
    return names


def ids_of_names(label: str | Sequence[str], id2label: Mapping | None) -> list[int]:
    """The ids of class names, one per name.

    Args:
        label (`str` or `Sequence[str]`): one name or several, in any case.
        id2label (`Mapping`, *optional*): class id -> names.

    Raises:
        ValueError: if a name is unknown or several classes share it.
    """
    known, ids = ids_by_name(id2label), []
    for name in [label] if isinstance(label, str) else label:
        found = known.get(name.strip().casefold(), [])
        if not known:
            raise ValueError(f"label must be a class id, as this pipeline has no id2label, got {name!r}")
        if not found:
            near = difflib.get_close_matches(name.casefold(), known, n=3) or sorted(known)[:3]
            raise ValueError(f"label must be one of {len(known)} class names, such as {near}, got {name!r}")
        if len(found) > 1:
            raise ValueError(f"label must name one class, got {name!r}, which the classes {found} share")
        ids.append(found[0])
    return ids


def label_ids(
    class_labels: Labels, id2label: Mapping | None, num_classes: int, num_images_per_label: int = 1
) -> list[int]:
    """Class labels of any kind -> the class id of every image.

    Args:
        class_labels (`int`, `str`, a sequence of these, or `torch.Tensor`): class ids or names.
        id2label (`Mapping`, *optional*): class id -> names.
        num_classes (`int`): ids are below it.
        num_images_per_label (`int`, *optional*, defaults to 1): how often each label is repeated, at least 1.

    Raises:
        ValueError: if there is no label, one is unknown or out of range, or `num_images_per_label` is below 1.
    """
    if isinstance(class_labels, torch.Tensor | np.ndarray):
        class_labels = class_labels.reshape(-1).tolist()
    elif isinstance(class_labels, int | np.integer | str):
        class_labels = [class_labels]
    is_count = isinstance(num_images_per_label, int | np.integer) and not isinstance(num_images_per_label, bool)
    if not is_count or num_images_per_label < 1:
        raise ValueError(f"num_images_per_label must be an integer of at least 1, got {num_images_per_label}")
    if class_labels is None or not len(class_labels):
        raise ValueError("class_labels must name at least one class, got none")
    ids = []
    for label in class_labels:
        if isinstance(label, str):
            ids += ids_of_names(label, id2label)
        elif isinstance(label, int | np.integer) and not isinstance(label, bool):
            ids.append(int(label))
        else:
            raise ValueError(f"class_labels must be class names or ids, got {label!r}")
    for label_id in ids:
        if not 0 <= label_id < num_classes:
            raise ValueError(f"class_labels must be between 0 and {num_classes - 1}, got {label_id}")
    return [label_id for label_id in ids for _ in range(num_images_per_label)]
