"""What the site changes in text that is also read in the repository.

A name in backticks that begins with `novolstm_triton.` becomes a link, in pages and in docstrings; one that no page
describes is a warning of the build, like any other broken reference. A link to a source file, which is not part of the
site, becomes its text.
"""

import re
import xml.etree.ElementTree as etree

from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from markdown.treeprocessors import Treeprocessor
from markdown.util import AtomicString
from mkdocs.config.defaults import MkDocsConfig


class _Name(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[etree.Element, int, int]:
        reference = etree.Element("autoref", identifier=m[1])
        etree.SubElement(reference, "code").text = AtomicString(m[1])
        return reference, m.start(0), m.end(0)


class _SourceLinks(Treeprocessor):
    def run(self, root: etree.Element) -> None:
        for link in root.iter("a"):
            if re.fullmatch(r"[\w./]+\.py", link.get("href", "")):
                link.tag = "span"
                del link.attrib["href"]


class _RepositoryText(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        # Before the pattern of code spans, which has 190.
        md.inlinePatterns.register(_Name(r"(?<!`)`(novolstm_triton(?:\.\w+)+)`(?!`)", md), "names", 195)
        # After the links are made, which has 20, and before MkDocs looks where they go, which has 0.
        md.treeprocessors.register(_SourceLinks(md), "source_links", 10)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the extension to those that MkDocs and mkdocstrings convert text with."""
    config.markdown_extensions.append(_RepositoryText())
    return config
