"""Folders of the Hugging Face `datasets` library on disk: parquet files as the hub stores them, or what `save_to_disk` wrote.

Read with that library (`pip install 'comp-kernels[eval]'`), never from the network. Images stay encoded until they are needed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..config import ConfigError
from .batch import FileInFolder, ImageBytes, LazyImage

if TYPE_CHECKING:
    import datasets


def open_folder(
    path: str | Path, *, split: str, config: str | None = None, cache_dir: str | Path | None = None
) -> datasets.Dataset:
    """The rows of one split of the dataset in folder `path`.

    config:     name of the dataset's configuration; a subfolder of this name is used where there is one.
    cache_dir:  where the library keeps its copy of parquet files in memory-mapped form; None: its own default.
    Raises ConfigError where the library is missing, or the folder holds neither layout or not this split.
    """
    library = datasets_library()
    root = Path(path)
    if not root.is_dir():
        raise ConfigError(f"{root} is not a folder")
    if config is not None and (root / config).is_dir():
        root = root / config
    if (root / "dataset_dict.json").is_file():
        if not (root / split).is_dir():
            splits = sorted(p.name for p in root.iterdir() if p.is_dir())
            raise ConfigError(f"{root} has no split {split!r}, only {', '.join(splits)}")
        rows = library.load_from_disk(root / split)
    elif (root / "state.json").is_file():
        rows = library.load_from_disk(root)
        _check_single_split(root, rows.split, split)
    else:
        files = _parquet_files(root, split)
        cache = None if cache_dir is None else str(cache_dir)
        rows = library.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    return without_decoding(rows, library)


def datasets_library() -> Any:
    """The library `datasets`; ConfigError where it is missing."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"folders of Hugging Face datasets need the library: pip install 'comp-kernels[eval]' (or datasets); {error}"
        ) from error
    return datasets


def _check_single_split(root: Path, recorded: str | None, wanted: str) -> None:
    """A folder of one split that knows its name must hold the one that is wanted; a dataset made by hand has no name."""
    name = "" if recorded is None else str(recorded).partition("[")[0]  # "test[:100]" is a part of test
    if name not in ("", wanted):
        raise ConfigError(f"{root} holds split {str(recorded)!r} alone, not {wanted!r}")


def _parquet_files(root: Path, split: str) -> list[str]:
    """test-00000-of-00002.parquet, test.parquet or test/0000.parquet, anywhere below `root`."""
    everything = sorted(root.rglob("*.parquet"))
    numbered = re.compile(re.escape(split) + r"(-\d+-of-\d+.*)?")  # some copies put a digest behind the number
    files = [p for p in everything if numbered.fullmatch(p.stem) or p.parent.name == split]
    if not files:
        found = ", ".join(str(p.relative_to(root)) for p in everything[:5])
        raise ConfigError(
            f"{root} holds no split {split!r}: neither files like {split}-00000-of-00001.parquet nor what save_to_disk writes; "
            + (f"its parquet files are {found}" if found else "it has no parquet files at all")
        )
    return [str(p) for p in files]


def without_decoding(rows: Any, library: Any) -> Any:
    """Image columns, and columns of lists of images, as {"bytes", "path"}."""
    encoded = library.Image(decode=False)
    for name, feature in rows.features.items():
        if isinstance(feature, library.Image):
            rows = rows.cast_column(name, encoded)
        elif isinstance(getattr(feature, "feature", None), library.Image):
            rows = rows.cast_column(name, type(feature)(encoded))
    return rows


def lazy_image(value: Any) -> LazyImage:
    """What `comp.data.encode.load_image` reads, from an image cell: {"bytes", "path"} with either set, or a picture.

    Raises TypeError for anything else, an empty cell included.
    """
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, dict) and value.get("bytes"):
        return ImageBytes(value["bytes"])
    if isinstance(value, dict) and value.get("path"):
        return value["path"]
    raise TypeError(f"an image cell must hold bytes or a path, got {value!r:.80}")


def images_inside(value: Any, folder: Path, *, anywhere: bool = False) -> Any:
    """An image cell, or a list of them, whose file must lie in `folder` if it may not lie anywhere; relative names start from
    there. Other cells as they are. ValueError where a name leads out."""
    if isinstance(value, list):
        return [images_inside(one, folder, anywhere=anywhere) for one in value]
    if not isinstance(value, dict) or value.get("bytes") or not isinstance(value.get("path"), str):
        return value
    if anywhere:
        return {**value, "path": str(folder / value["path"])}
    name = value["path"]
    for root in (folder.absolute(), folder.resolve()):  # of a folder of pictures the library gives absolute names
        if Path(name).is_relative_to(root):
            name = str(Path(name).relative_to(root))
    return {**value, "path": FileInFolder(name, folder, "; images_anywhere=true allows that")}
