"Sphinx settings; `docs/build.py` copies this beside the pages it makes."

project, author, copyright = "modeltc_lab", "The modeltc_lab authors", "The modeltc_lab authors, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.mathjax"]
root_doc = "index"
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "html_image"]
myst_heading_anchors = 3
myst_all_links_external = True
mathjax_path = "mathjax/tex-mml-chtml.js"
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]
html_theme = "pydata_sphinx_theme"
html_title = "modeltc_lab"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = [("plotly.min.js", {"defer": "defer"}), ("figures.js", {"defer": "defer"})]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "navbar_align": "left", "navbar_end": ["theme-switcher"], "navbar_persistent": ["search-button"], "show_toc_level": 2, "header_links_before_dropdown": 7,
    "footer_start": ["copyright"], "footer_end": [], "secondary_sidebar_items": ["page-toc"], "show_prev_next": True, "collapse_navigation": False,
    "navigation_depth": 2, "logo": {"text": "modeltc_lab"}, "pygments_light_style": "tango", "pygments_dark_style": "monokai"}
html_sidebars = {"index": [], "status": [], "log": [], "changelog": []}
