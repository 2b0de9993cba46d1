"""Text in and out: the tokenizer and the chat format."""

from minglm.text.answer import Answer, ToolCall, parse_answer
from minglm.text.template import ChatTemplate
from minglm.text.tokenizer import StreamDecoder, Tokenizer, train_tokenizer

__all__ = ["Answer", "ChatTemplate", "StreamDecoder", "Tokenizer", "ToolCall", "parse_answer", "train_tokenizer"]
