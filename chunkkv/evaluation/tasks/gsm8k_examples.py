"""Eight worked problems in the manner of the usual 8-shot prompt for GSM8K, with new texts.

The usual eight (https://arxiv.org/abs/2201.11903, appendix) have the same form: a short story,
one step of arithmetic a sentence, then "The answer is N."
"""

from __future__ import annotations

from typing import Final

# Question, and answer with its steps.
WORKED: Final = (
    (
        "A baker puts 24 rolls on a tray. She sells 9 of them in the morning and bakes 6 more "
        "at noon. How many rolls are on the tray then?",
        "There are 24 rolls at first. After 9 are sold, 24 - 9 = 15 are left. With 6 new ones "
        "there are 15 + 6 = 21. The answer is 21.",
    ),
    (
        "A bus has 12 rows with 4 seats in each row. 7 seats are broken. How many seats can be "
        "used?",
        "The bus has 12 * 4 = 48 seats. Of these 48 - 7 = 41 can be used. The answer is 41.",
    ),
    (
        "Nadia reads 15 pages on Monday and twice as many on Tuesday. Her book has 100 pages. "
        "How many pages are left?",
        "On Tuesday she reads 2 * 15 = 30 pages. In two days that is 15 + 30 = 45 pages. There "
        "are 100 - 45 = 55 pages left. The answer is 55.",
    ),
    (
        "Three friends share a bill of $84 equally. Each of them also leaves a tip of $4. How "
        "much does each friend pay?",
        "Each share of the bill is 84 / 3 = 28 dollars. With the tip it is 28 + 4 = 32 dollars. "
        "The answer is 32.",
    ),
    (
        "A tank holds 60 liters and is one third full. A pump adds 5 liters a minute. How many "
        "minutes does it take to fill the tank?",
        "The tank has 60 / 3 = 20 liters in it. It needs 60 - 20 = 40 more. That takes 40 / 5 = "
        "8 minutes. The answer is 8.",
    ),
    (
        "Omar had some stamps. He gave 13 to his sister and then bought 20. Now he has 52. How "
        "many stamps did he have at first?",
        "Before he bought 20 he had 52 - 20 = 32. Before he gave 13 away he had 32 + 13 = 45. "
        "The answer is 45.",
    ),
    (
        "Pencils cost $2 each and notebooks $5 each. Lina buys 6 pencils and 3 notebooks with a "
        "$50 bill. How much change does she get?",
        "The pencils cost 6 * 2 = 12 dollars. The notebooks cost 3 * 5 = 15 dollars. Together "
        "that is 12 + 15 = 27 dollars. She gets 50 - 27 = 23 dollars back. The answer is 23.",
    ),
    (
        "A farmer has 8 hens. Each hen lays 5 eggs a week. He sells eggs by the dozen. How many "
        "full dozens does he have after 3 weeks?",
        "In a week the hens lay 8 * 5 = 40 eggs. In 3 weeks they lay 3 * 40 = 120. That is 120 "
        "/ 12 = 10 dozens. The answer is 10.",
    ),
)
