"""The trace page: a forward pass as one HTML file that needs no network. `write_page(model, prompt, "trace.html")`."""

from minglm.look.page.build import write_page

__all__ = ["write_page"]
