import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
from ts.torch_handler.base_handler import BaseHandler


class QuestionAnswering(BaseHandler):
    def initialize(self, context):
        folder = context.system_properties["model_dir"]
        self.model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.initialized = True

    def preprocess(self, data):
        texts = [item.get("data") or item.get("body") for item in data]
        texts = [text.decode("utf-8") if isinstance(text, (bytes, bytearray)) else text for text in texts]
        return self.tokenizer(texts, padding="max_length", truncation=True, max_length=16, return_tensors="pt")

    def inference(self, data):
        with torch.inference_mode():
            return self.model(data["input_ids"], attention_mask=data["attention_mask"])

    def postprocess(self, data):
        return [{"start": start.argmax().item(), "end": end.argmax().item()}
                for start, end in zip(data.start_logits, data.end_logits)]
