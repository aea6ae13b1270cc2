from collections import Counter

from rows_handler import RowsHandler


class Letters(RowsHandler):
    """A handler that counts the vowels and the letter n in a text, and answers with the label as plain text."""

    def preprocess(self, data):
        texts = [item.get("data") or item.get("body") for item in data]
        texts = [text.decode() if isinstance(text, (bytes, bytearray)) else text for text in texts]
        counts = [Counter(text.lower()) for text in texts]
        return super().preprocess([{"body": [float(count[letter]) for letter in "aeioun"]} for count in counts])

    def postprocess(self, data):
        return [("sport", "politics", "weather")[number] for number in data.argmax(dim=1).tolist()]
