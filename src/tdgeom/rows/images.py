"""Images to batches: the files of a folder, and ``ImageBatches``, a loader that ``run`` can read again and again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

__all__ = ["ImageBatches", "image_files", "is_image", "is_image_processor"]

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def is_image(value: Any) -> bool:
    """Whether something is a PIL image."""
    return hasattr(value, "convert") and hasattr(value, "getbands")


def is_image_processor(value: Any) -> bool:
    """Whether something makes pixels of images, as transformers' image processors do."""
    return callable(value) and "pixel_values" in getattr(value, "model_input_names", ())


def image_files(folder: str | Path) -> list[Path]:
    """The images in a folder and the folders in it, by name.

    Raises:
        FileNotFoundError: no such folder. ValueError: no image in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: expected one with images.")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    if not found:
        raise ValueError(f"{folder} holds no images: expected files ending in {', '.join(ENDINGS)}.")
    return found


class ImageBatches:
    """Images as batches of pixels: a loader for ``run`` and ``analyze_model``.

    Each batch has what the image processor makes (``pixel_values`` (B, C, H, W)), ``document_id`` (B,) (the image's index), and
    for files ``file`` and ``folder``, lists of text that ``SelectTokens(also=["folder"])`` carries.

    Args:
        images: PIL images, paths of files, or a folder's path. Or pairs of one and a dict of further values of it.
        processor: the model's image processor, such as ``AutoImageProcessor.from_pretrained(name)``.
        batch_size: images a batch.

    Raises:
        FileNotFoundError: no such folder. ValueError (while reading): a file that is no image.
    """

    def __init__(self, images: Iterable[Any] | str | Path, processor: Any, *, batch_size: int = 8) -> None:
        self.images: Iterable[Any] = image_files(images) if isinstance(images, str | Path) else images
        self.processor, self.batch_size = processor, batch_size
        self.part = (0, 1)  # see DataSource
        if not is_image_processor(processor):
            raise TypeError(
                f"ImageBatches takes an image processor (transformers.AutoImageProcessor), got {type(processor).__name__}."
            )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        images, count = iter(self.images), 0
        while chunk := [self._opened(one) for one in islice(images, self.batch_size)]:
            batch = dict(self.processor([image for image, _ in chunk], return_tensors="pt"))
            known = {name: [columns.get(name) for _, columns in chunk] for name in chunk[0][1]}
            numbers = torch.arange(count, count + len(chunk), device="cpu") * self.part[1] + self.part[0]
            count += len(chunk)
            yield {"document_id": numbers, **known, **batch}

    def _opened(self, given: Any) -> tuple[Any, dict[str, Any]]:
        columns: dict[str, Any] = {}
        if isinstance(given, tuple):
            given, columns = given
        if isinstance(given, str | Path):
            path = Path(given)
            columns = {"file": path.name, "folder": path.parent.name, **columns}
            given = _read(path)
        return given.convert("RGB"), columns


def _read(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
