"""Text in and out: the tokenizer and the chat format."""

from minglm.text.chat import Answer, ChatTemplate, ToolCall, parse_answer
from minglm.text.tokenizer import StreamDecoder, Tokenizer, train_tokenizer

__all__ = ["Answer", "ChatTemplate", "StreamDecoder", "Tokenizer", "ToolCall", "parse_answer", "train_tokenizer"]
