import torch
from captum.attr import LayerIntegratedGradients
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from ts.torch_handler.base_handler import BaseHandler


class SequenceClassifier(BaseHandler):
    """A handler that loads a folder of save_pretrained without a model file, like TorchServe's Hugging Face example."""

    def initialize(self, context):
        self.manifest, self.device = context.manifest, torch.device("cpu")
        folder = context.system_properties["model_dir"]
        self.model = AutoModelForSequenceClassification.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model.to(self.device).eval()
        self.layer_gradients = LayerIntegratedGradients(self.scores, self.model.bert.embeddings)
        self.initialized = True

    def scores(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask=attention_mask)[0].softmax(dim=1)

    def preprocess(self, data):
        texts = [item.get("data") or item.get("body") for item in data]
        texts = [text.decode("utf-8") if isinstance(text, (bytes, bytearray)) else text for text in texts]
        return self.tokenizer(texts, padding="max_length", truncation=True, max_length=16, return_tensors="pt")

    def inference(self, data):
        with torch.inference_mode():
            return self.model(data["input_ids"], attention_mask=data["attention_mask"])[0]

    def postprocess(self, data):
        names = self.model.config.id2label
        return [{"label": names[row.argmax().item()], "score": row.max().item()} for row in data.softmax(dim=1)]

    def get_insights(self, tensor_data, text, target=0):
        attributions = self.layer_gradients.attribute(
            tensor_data["input_ids"], target=int(target), n_steps=10,
            additional_forward_args=(tensor_data["attention_mask"],))
        words = self.tokenizer.convert_ids_to_tokens(tensor_data["input_ids"][0])
        return [{"words": words, "importances": attributions[0].sum(dim=-1).tolist()}]
