import io

from PIL import Image, ImageDraw
from rows_handler import RowsHandler


class PictureOut(RowsHandler):
    """A handler that answers with a chart."""

    def handle(self, data, context):
        answers = super().handle(data, context)
        for position in range(len(data)):
            context.set_response_content_type(position, "image/png")
        return answers

    def postprocess(self, data):
        return [chart(row.tolist()) for row in data.softmax(dim=1)]


def chart(values):
    image = Image.new("RGB", (30, 50), "white")
    for number, value in enumerate(values):
        ImageDraw.Draw(image).rectangle((10 * number, 50 - round(50 * value), 10 * number + 8, 50), "navy")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
