"""Formats of rows: OpenAI chat, alpaca, sharegpt, plain text."""

from .alpaca import Alpaca
from .base import MEDIA_COLUMNS, Columns, Format, Tags, refuse_media
from .openai_chat import OPENAI_TAGS, OpenAIChat
from .recognise import recognise
from .sharegpt import ShareGPT
from .text import Text

__all__ = [
    "MEDIA_COLUMNS",
    "OPENAI_TAGS",
    "Alpaca",
    "Columns",
    "Format",
    "OpenAIChat",
    "ShareGPT",
    "Tags",
    "Text",
    "recognise",
    "refuse_media",
]
