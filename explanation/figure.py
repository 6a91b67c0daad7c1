"""An explanation as one picture, for papers: photograph, prediction, and the prototypes that made each class."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from explanation.pictures import MARGIN

WIDTH, TALLEST = 640, 1920  # pixels of the photograph in the figure


def explained_figure(image: Image.Image, painted: Image.Image, rows: list[dict]) -> Image.Image:
    """A photograph above its prediction, and beside them a legend with the prototypes that made each class.

    rows: of each class its `name`, `color`, `share` of the pixels 0..1 and, if any, `prototypes`, each with its number
    `prototype`, `picture` or None, `share` of the class's cells that it decides, and `at`, the pixel (x, y) of the
    image where it is the most similar: that is marked with the same number.
    """
    scale = min(WIDTH / image.width, TALLEST / image.height)
    size = [max(1, round(scale * length)) for length in image.size]
    left = [picture.resize(size, Image.Resampling.BICUBIC) for picture in (image, painted)]
    tall, line, wide = left[0].height, 132, 312
    in_column = max(4, (2 * tall + MARGIN) // line)
    columns = -(-len(rows) // in_column)
    height = max(2 * tall + MARGIN, min(len(rows), in_column) * line)
    page = Image.new("RGB", (WIDTH + columns * (wide + MARGIN), height), "white")
    for i, picture in enumerate(left):
        for row in rows:
            for prototype in row.get("prototypes", ()):
                _mark(picture, str(prototype["prototype"]), [scale * c for c in prototype["at"]])
        page.paste(picture, (0, i * (tall + MARGIN)))
    for i, row in enumerate(rows):
        corner = (WIDTH + 2 * MARGIN + i // in_column * (wide + MARGIN), i % in_column * line)
        _figure_row(page, row, corner)
    return page


def _figure_row(page: Image.Image, row: dict, corner: tuple[int, int]) -> None:
    (x, y), pen, font = corner, ImageDraw.Draw(page), ImageFont.load_default(13)
    pen.rectangle((x, y + 4, x + 11, y + 15), fill=tuple(row["color"]), outline="black")
    name = " ".join(row["name"].split())
    name = name if len(name) <= 32 else name[:31] + "..."
    pen.text((x + 18, y + 1), f"{name}  {100 * row['share']:.1f} %", fill="black", font=font)
    for i, prototype in enumerate(row.get("prototypes", ())):
        left = x + i * 104
        if prototype["picture"] is not None:
            page.paste(prototype["picture"].resize((92, 92)), (left, y + 20))
        caption = f"{prototype['prototype']}: {100 * prototype['share']:.0f} %"
        pen.text((left, y + 113), caption, fill="black", font=font)


def _mark(picture: Image.Image, text: str, at: list[float]) -> None:
    """A number in a white disc, on the picture in full."""
    pen, font, radius = ImageDraw.Draw(picture), ImageFont.load_default(11), 10
    x, y = (min(max(radius, c), length - radius - 1) for c, length in zip(at, picture.size, strict=True))
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill="white", outline="black")
    pen.text((x, y), text, fill="black", font=font, anchor="mm")
