"""Makes a link of every name in backticks that begins with `novolstm_triton.`, in pages and in docstrings.

A name that no page describes is a warning of the build, like any other broken reference.
"""

import re
import xml.etree.ElementTree as etree

from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from markdown.util import AtomicString
from mkdocs.config.defaults import MkDocsConfig


class _Name(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[etree.Element, int, int]:
        reference = etree.Element("autoref", identifier=m[1])
        etree.SubElement(reference, "code").text = AtomicString(m[1])
        return reference, m.start(0), m.end(0)


class _Names(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        # Before the pattern of code spans, which has 190.
        md.inlinePatterns.register(_Name(r"(?<!`)`(novolstm_triton(?:\.\w+)+)`(?!`)", md), "names", 195)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the extension to those that MkDocs and mkdocstrings convert text with."""
    config.markdown_extensions.append(_Names())
    return config
