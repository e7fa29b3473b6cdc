"""An audit's page as one HTML file that needs no other."""

import base64

import mistune

HTML = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Audit</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
th, td {{ padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left }}
img {{ max-width: 100% }}
</style>
{body}
</html>
"""


def html_page(text: str, images: dict[str, bytes]) -> str:
    """Markdown as HTML; images: file → PNG, which takes the place of the file."""
    for file, png in images.items():
        text = text.replace(f"]({file})", f"](data:image/png;base64,{base64.b64encode(png).decode()})")
    return HTML.format(body=mistune.create_markdown(plugins=["table"])(text))
