"""How answers are read and compared. Which rule a task has, and who grades by it: `data/sets/` and `data/grading.py`.

numbers.py       exact decimals and ratios, folded text, what stands after a mark, the number a text begins with
chinese.py       Chinese numerals in digits
latex.py         whether two LaTeX answers are equal: typesetting, lists, units and exact numbers are settled there
latex_parts.py   what a LaTeX answer is made of: lists, intervals, assignments, units
checker.py       what is left, single expressions, asked of math-verify in a process with limits
"""
