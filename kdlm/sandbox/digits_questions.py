"""Questions about the digits: an image, what is asked about it, and the answer in one word."""

from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from kdlm.sandbox.progress import Progress

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

QUESTIONS = {
    "which digit is this ?": lambda digit: NAMES[digit],
    "which digit follows this one ?": lambda digit: NAMES[(digit + 1) % 10],
    "is this digit even ?": lambda digit: "no" if digit % 2 else "yes",
}
"""What is asked, and the answer to it."""


@dataclass(frozen=True)
class DigitsQuestions:
    """Every digit with each of the questions: `train.parquet`, `eval.parquet`, images as PNG files in a column."""

    needs: tuple[str, ...] = ()

    def ingredients(self) -> dict[str, Any]:
        return {**asdict(self), "questions": list(QUESTIONS)}

    def make(self, folder: Path, built: dict[str, Path], progress: Progress, name: str) -> dict[str, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        from kdlm.sandbox.digits import digits

        figures = {}
        for split, part in zip(("train", "eval"), digits(), strict=True):
            files = [png(image) for image in part.images]
            rows = [
                {"images": [{"bytes": file, "path": None}], "prompt": question, "completion": answer(digit)}
                for file, digit in zip(files, part.labels.tolist(), strict=True)
                for question, answer in QUESTIONS.items()
            ]
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
            figures[split] = len(rows)
        return figures


def png(image: Any) -> bytes:
    """Return a grey image of values in [0, 1] as the bytes of a PNG file."""
    from PIL import Image

    file = BytesIO()
    Image.fromarray((image[0] * 255).round().byte().numpy()).save(file, format="PNG")
    return file.getvalue()
