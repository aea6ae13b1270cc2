"""A handler that answers a text with the likeliest of four classes. The letters of the text are the tokens."""

import torch
from ts.torch_handler.base_handler import BaseHandler

LENGTH = 16


class TextHandler(BaseHandler):
    def preprocess(self, data):
        texts = [item.get("data", item.get("body")) for item in data]
        letters = [(text.decode() if isinstance(text, (bytes, bytearray)) else text).encode()[:LENGTH]
                   for text in texts]
        tokens = torch.tensor([[letter % 128 for letter in one.ljust(LENGTH, b" ")] for one in letters])
        mask = torch.tensor([[int(place < len(one)) for place in range(LENGTH)] for one in letters])
        return tokens, mask

    def inference(self, data):
        tokens, mask = data
        with torch.inference_mode():
            return self.model(input_ids=tokens, attention_mask=mask)["logits"]

    def postprocess(self, data):
        return [{"class": scores.argmax().item(), "scores": scores.tolist()} for scores in data]
