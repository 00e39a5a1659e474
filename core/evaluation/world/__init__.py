"""An invented world in the wording that the bundled pair reads: names, values, attributes.

Names are made from roots of two or three syllables. A stable hash keeps one root in ten out of
training; evaluation uses only those. `attributes.txt` holds the wordings of statements and
questions, `words.txt` the syllables and word lists, `sentences.txt` natural text in between.
"""
