"A notebook-first workbench for efficient-model techniques."

__version__ = "0.1.0"
