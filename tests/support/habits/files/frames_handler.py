import base64
import io
import json

import torch
from PIL import Image
from torchvision import transforms
from ts.torch_handler.base_handler import BaseHandler


class FramesHandler(BaseHandler):
    """A handler of requests that hold an image as base64 inside JSON."""

    look = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor(),
                               transforms.Normalize([0.45, 0.45, 0.45], [0.25, 0.25, 0.25])])

    def preprocess(self, data):
        images = []
        for item in data:
            body = item.get("data") or item.get("body")
            body = json.loads(body) if isinstance(body, (bytes, bytearray)) else body
            images.append(self.look(Image.open(io.BytesIO(base64.b64decode(body["image"]))).convert("RGB")))
        return torch.stack(images).to(self.device)

    def postprocess(self, data):
        values, classes = data.softmax(dim=1).topk(3)
        return [[{"class": number, "probability": value} for number, value in zip(*row)]
                for row in zip(classes.tolist(), values.tolist())]
