"""How each evaluation reads and compares answers: pairs judged by hand, and what must hold for every text.

Gold answers are taken from real rows; the completions are what models write, and what they must not get a point for.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.data.sets import EVALUATIONS, Member
from kvdistill.data.sets.base import fixed_order
from kvdistill.data.sets.bbh import KINDS
from kvdistill.data.sets.letters import ALPHABET, read_letter, write_lettered

EQUAL, NOT = True, False
POLAR = "\\left( 3, \\frac{\\pi}{2} \\right)"

# member, completion, gold answer, whether it is right
PAIRS: list[tuple[str, str, str, bool]] = [
    # gsm8k: the number behind the first ####
    ("gsm8k", "16 - 3 - 4 = 9 eggs, 9 * 2 = 18 dollars.\n#### 18", "18", EQUAL),
    ("gsm8k", " so $18\n#### $18", "18", EQUAL),
    ("gsm8k", "#### 18.00", "18", EQUAL),
    ("gsm8k", "#### 1,450,000", "1450000", EQUAL),
    ("gsm8k", "#### 1450000", "1450000", EQUAL),
    ("gsm8k", "#### -10", "-10", EQUAL),
    ("gsm8k", "#### −10", "-10", EQUAL),  # a minus sign for the hyphen
    ("gsm8k", "####18", "18", EQUAL),
    ("gsm8k", "#### 18\n\nQuestion: and then?\nAnswer: 5\n#### 5", "18", EQUAL),
    ("gsm8k", "#### 18 dollars", "18", EQUAL),
    ("gsm8k", "#### 10", "-10", NOT),
    ("gsm8k", "#### 1,450", "1450000", NOT),
    ("gsm8k", "#### 18.5", "18", NOT),
    ("gsm8k", "#### 180", "18", NOT),
    ("gsm8k", "The answer is 18.", "18", NOT),  # not marked as it must be
    ("gsm8k", "9 * 2 = 18", "18", NOT),
    ("gsm8k", "#### 9\nno, it is\n#### 18", "18", NOT),
    ("gsm8k", "#### 36/2", "18", NOT),
    ("gsm8k", "####", "18", NOT),
    ("gsm8k", "#### x", "18", NOT),
    # math500: behind the prompt's mark, else the last box; compared as mathematics
    (
        "math500",
        "so\nFinal Answer: The final answer is $\\left( 3, \\frac{\\pi}{2} \\right)$. I hope it is correct.",
        "\\left( 3, \\frac{\\pi}{2} \\right)",
        EQUAL,
    ),
    ("math500", "The final answer is $(3, \\frac{\\pi}{2})$. I hope it is correct.", POLAR, EQUAL),
    ("math500", "The final answer is $(3, \\pi)$. I hope it is correct.", "\\left( 3, \\frac{\\pi}{2} \\right)", NOT),
    ("math500", "The final answer is $(\\frac{\\pi}{2}, 3)$. I hope it is correct.", POLAR, NOT),
    ("math500", "Therefore \\boxed{p - q}.", "p - q", EQUAL),
    ("math500", "Therefore $\\boxed{-q+p}$.", "p - q", EQUAL),
    ("math500", "Therefore $\\boxed{q-p}$.", "p - q", NOT),
    ("math500", "The final answer is $\\frac{14}{3}$", "\\frac{14}{3}", EQUAL),  # cut off before the hope
    ("math500", "The final answer is: $14/3$. I hope it is correct.", "\\frac{14}{3}", EQUAL),
    ("math500", "The final answer is $\\boxed{\\dfrac{14}{3}}$. I hope it is correct.", "\\frac{14}{3}", EQUAL),
    ("math500", "The final answer is $4.67$. I hope it is correct.", "\\frac{14}{3}", NOT),
    ("math500", "The final answer is $\\frac{3}{14}$. I hope it is correct.", "\\frac{14}{3}", NOT),
    ("math500", "The final answer is $\\text{Evelyn}$. I hope it is correct.", "\\text{Evelyn}", EQUAL),
    ("math500", "The final answer is Evelyn. I hope it is correct.", "\\text{Evelyn}", EQUAL),
    ("math500", "The final answer is Debra. I hope it is correct.", "\\text{Evelyn}", NOT),
    ("math500", "The final answer is $90^\\circ$. I hope it is correct.", "90^\\circ", EQUAL),
    ("math500", "\\boxed{90}", "90^\\circ", EQUAL),
    ("math500", "\\boxed{9}", "90^\\circ", NOT),
    ("math500", "\\boxed{\\frac{\\sqrt{117}}{1}}", "3\\sqrt{13}", EQUAL),
    ("math500", "\\boxed{13\\sqrt{3}}", "3\\sqrt{13}", NOT),
    ("math500", "\\boxed{6 + 5i}", "6 - 5i", NOT),
    ("math500", "\\boxed{6-5i}", "6 - 5i", EQUAL),
    ("math500", "The final answer is $52_8$. I hope it is correct.", "52_8", EQUAL),
    ("math500", "The final answer is $52$. I hope it is correct.", "52_8", NOT),
    ("math500", "\\boxed{(2, 5]}", "(2,\\infty)", NOT),
    ("math500", "\\boxed{(2,\\infty)}", "(2,\\infty)", EQUAL),
    ("math500", "\\boxed{11,111,111,100}", "11,\\! 111,\\! 111,\\! 100", EQUAL),
    ("math500", "\\boxed{\\$32,348}", "\\$32,\\!348", EQUAL),
    ("math500", "\\boxed{1.8}", "1\\frac{4}{5}", EQUAL),
    ("math500", "\\boxed{.15}", "0.15", EQUAL),
    ("math500", "\\boxed{15}", "0.15", NOT),
    ("math500", "\\boxed{x^3+3x+6}", "x^3+3x-6", NOT),
    ("math500", "\\boxed{1} then \\boxed{2}", "2", EQUAL),
    ("math500", "\\boxed{2} then \\boxed{1}", "2", NOT),
    ("math500", "x is 2", "2", NOT),
    ("math500", "\\boxed{2}\n\nProblem:\nAnother\n\nSolution: \\boxed{7}", "2", EQUAL),
    # bbh, lettered options
    ("bbh_date_understanding", "Ten days before is 12/14/1937. So the answer is (D).", "(D)", EQUAL),
    ("bbh_date_understanding", "So the answer is D.", "(D)", EQUAL),
    ("bbh_date_understanding", "So the answer is (d)", "(D)", EQUAL),
    ("bbh_date_understanding", "So the answer is **(D)**.", "(D)", EQUAL),
    ("bbh_date_understanding", "So the answer is (D) 12/14/1937.", "(D)", EQUAL),
    ("bbh_date_understanding", "So the answer is (C).", "(D)", NOT),
    ("bbh_date_understanding", "What the answer is follows from the year. So the answer is (D).", "(D)", EQUAL),
    ("bbh_date_understanding", "So the answer is (D). No, the answer is (C).", "(C)", NOT),
    ("bbh_date_understanding", "So the answer is (C) or (D).", "(D)", NOT),
    ("bbh_date_understanding", "It must be (D).", "(D)", NOT),
    ("bbh_date_understanding", "So the answer is 12/14/1937.", "(D)", NOT),
    ("bbh_date_understanding", "So the answer is (C).\n\nQ: next\nA: So the answer is (D).", "(D)", NOT),
    ("bbh_snarks", "Above the above, the sarcastic option is (A). So the answer is (A).", "(A)", EQUAL),
    ("bbh_snarks", "So the answer is a sarcastic one.", "(A)", NOT),
    ("bbh_reasoning_about_colored_objects", "So the answer is (R).", "(R)", EQUAL),
    ("bbh_reasoning_about_colored_objects", "So the answer is brown.", "(R)", NOT),
    ("bbh_movie_recommendation", "So the answer is Monsters, Inc.", "Monsters, Inc", EQUAL),
    ("bbh_movie_recommendation", "So the answer is (A).", "Monsters, Inc", NOT),  # the option is "Monsters" alone
    ("bbh_ruin_names", "So the answer is rita, sue and bob poo.", "rita, sue and bob poo", EQUAL),
    ("bbh_ruin_names", "So the answer is rita, sue and bob too.", "rita, sue and bob poo", NOT),
    # bbh, words
    ("bbh_boolean_expressions", "Z = not not True = True. So the answer is True.", "True", EQUAL),
    ("bbh_boolean_expressions", "so the answer is true", "True", EQUAL),
    ("bbh_boolean_expressions", "So the answer is False.", "True", NOT),
    ("bbh_boolean_expressions", "So the answer is not False.", "True", NOT),
    ("bbh_boolean_expressions", "So the answer is Yes.", "True", NOT),
    ("bbh_navigate", "We are not where we started. So the answer is No.", "No", EQUAL),
    ("bbh_navigate", "So the answer is: no", "No", EQUAL),
    ("bbh_navigate", "So the answer is No, since (0, 21) is not (0, 0).", "No", EQUAL),
    ("bbh_navigate", "So the answer is Yes.", "No", NOT),
    ("bbh_navigate", "So the answer is Norway.", "No", NOT),
    ("bbh_navigate", "So the answer is Yes and No.", "No", NOT),
    ("bbh_navigate", "No.", "No", NOT),
    ("bbh_sports_understanding", "Touchdown is part of American football. So the answer is no.", "no", EQUAL),
    ("bbh_sports_understanding", "So the answer is NO.", "no", EQUAL),
    ("bbh_sports_understanding", "So the answer is not plausible.", "no", NOT),
    ("bbh_causal_judgement", "So the answer is Yes.", "Yes", EQUAL),
    ("bbh_web_of_lies", "Jamey lies. So the answer is No.", "Yes", NOT),
    ("bbh_formal_fallacies", "So the answer is valid.", "valid", EQUAL),
    ("bbh_formal_fallacies", "So the answer is invalid.", "invalid", EQUAL),
    ("bbh_formal_fallacies", "So the answer is invalid.", "valid", NOT),
    ("bbh_formal_fallacies", "So the answer is valid.", "invalid", NOT),
    ("bbh_formal_fallacies", "So the answer is not valid.", "valid", NOT),
    ("bbh_formal_fallacies", "So the answer is \"invalid\".", "invalid", EQUAL),
    # bbh, numbers
    ("bbh_multistep_arithmetic_two", "A - B = -163 - 56 = -219. So the answer is -219.", "-219", EQUAL),
    ("bbh_multistep_arithmetic_two", "So the answer is −219.", "-219", EQUAL),
    ("bbh_multistep_arithmetic_two", "So the answer is 219.", "-219", NOT),
    ("bbh_multistep_arithmetic_two", "So the answer is 3,929.", "3929", EQUAL),
    ("bbh_multistep_arithmetic_two", "So the answer is $\\boxed{3929}$.", "3929", EQUAL),
    ("bbh_multistep_arithmetic_two", "So the answer is 3929.5.", "3929", NOT),
    ("bbh_multistep_arithmetic_two", "So the answer is 3969 - 40.", "3929", NOT),
    ("bbh_object_counting", "1 + 1 + 2 + 1 = 5. So the answer is 5.", "5", EQUAL),
    ("bbh_object_counting", "So the answer is 5 animals.", "5", EQUAL),
    ("bbh_object_counting", "So the answer is 15.", "5", NOT),
    ("bbh_object_counting", "I count 5.", "5", NOT),
    # bbh, closing brackets
    ("bbh_dyck_languages", 'So, we need "]", ")", ")". So the answer is ] ) ).', "] ) )", EQUAL),
    ("bbh_dyck_languages", "So the answer is ])).", "] ) )", EQUAL),
    ("bbh_dyck_languages", "So the answer is `] ) )`", "] ) )", EQUAL),
    ("bbh_dyck_languages", 'So the answer is "]", ")", ")".', "] ) )", EQUAL),
    ("bbh_dyck_languages", "So the answer is ] ).", "] ) )", NOT),
    ("bbh_dyck_languages", "So the answer is ) ) ].", "] ) )", NOT),
    ("bbh_dyck_languages", "So the answer is [ ( (.", "] ) )", NOT),
    ("bbh_dyck_languages", "So the answer is ] ) ) ].", "] ) )", NOT),
    ("bbh_dyck_languages", "So the answer is } ] >.", "} ] >", EQUAL),
    ("bbh_dyck_languages", "So the answer is >.", ">", EQUAL),
    # bbh, sorted words
    ("bbh_word_sorting", "So the answer is syndrome therefrom.", "syndrome therefrom", EQUAL),
    ("bbh_word_sorting", "So the answer is syndrome, therefrom.", "syndrome therefrom", EQUAL),
    ("bbh_word_sorting", 'So the answer is "syndrome", "therefrom".', "syndrome therefrom", EQUAL),
    ("bbh_word_sorting", "So the answer is Syndrome therefrom", "syndrome therefrom", EQUAL),
    ("bbh_word_sorting", "So the answer is ['syndrome', 'therefrom'].", "syndrome therefrom", EQUAL),
    ("bbh_word_sorting", "So the answer is therefrom syndrome.", "syndrome therefrom", NOT),
    ("bbh_word_sorting", "So the answer is syndrome.", "syndrome therefrom", NOT),
    ("bbh_word_sorting", "So the answer is syndrome syndrome therefrom.", "syndrome therefrom", NOT),
    ("bbh_word_sorting", "So the answer is can't o'connell shouldn’t.", "can't o'connell shouldn't", EQUAL),
    ("bbh_word_sorting", "So the answer is cant oconnell shouldnt.", "can't o'connell shouldn't", NOT),
    ("bbh_word_sorting", "So the answer is guru it&t malton.", "guru it&t malton", EQUAL),
    # gpqa: a letter, in English
    ("gpqa_main", " (C)", "C", EQUAL),
    ("gpqa_main", "C", "C", EQUAL),
    ("gpqa_main", "The correct answer is (C), because the others violate parity.", "C", EQUAL),
    ("gpqa_main", "Let me think. (A) is wrong. The answer is C.", "C", EQUAL),
    ("gpqa_main", "**Answer:** C", "C", EQUAL),
    ("gpqa_main", "\\boxed{C}", "C", EQUAL),
    ("gpqa_main", "c", "C", EQUAL),
    ("gpqa_main", "C++ would do it", "C", NOT),
    ("gpqa_main", "Carbon", "C", NOT),
    ("gpqa_main", "The answer is not C", "C", NOT),
    ("gpqa_main", "A and C", "C", NOT),
    ("gpqa_main", "(A) (B) (C) (D)", "A", NOT),
    ("gpqa_diamond", "Option B is correct.", "B", EQUAL),
    ("gpqa_diamond", "I would go with (B)", "B", EQUAL),
    ("gpqa_diamond", "I would not choose B", "B", NOT),
    ("gpqa_diamond", "A photon is emitted.", "A", NOT),
    ("gpqa_diamond", "The answer is a photon.", "A", NOT),
    ("gpqa_diamond", "The answer is A.", "A", EQUAL),
    # cmmlu and ceval: a letter, in Chinese
    ("cmmlu_logical", "D", "D", EQUAL),
    ("cmmlu_logical", "答案：D", "D", EQUAL),
    ("cmmlu_logical", "答案是D。", "D", EQUAL),
    ("cmmlu_logical", "正确答案为（Ｄ）", "D", EQUAL),
    ("cmmlu_logical", "D. 亚里士多德", "D", EQUAL),
    ("cmmlu_logical", "D、亚里士多德", "D", EQUAL),
    ("cmmlu_logical", "因此，选D。", "D", EQUAL),
    ("cmmlu_logical", "亚里士多德", "D", NOT),
    ("cmmlu_logical", "答案：A、D", "D", NOT),
    ("cmmlu_logical", "答案：AD", "D", NOT),
    ("cmmlu_logical", "不选D", "D", NOT),
    ("cmmlu_logical", "D选项不正确", "D", NOT),
    ("cmmlu_logical", "答案不是D", "D", NOT),
    ("cmmlu_chinese_driving_rule", "选C，因为不得超车", "C", EQUAL),
    ("cmmlu_chinese_driving_rule", "C语言", "C", NOT),
    ("cmmlu_chinese_driving_rule", "A选项错误，应选C", "C", EQUAL),
    ("ceval_computer_network", "Ｃ", "C", EQUAL),
    ("ceval_computer_network", "【答案】C", "C", EQUAL),
    ("ceval_computer_network", "C\n\n问题：下一题\nA. 1\n答案：B", "C", EQUAL),
    ("ceval_computer_network", "The answer is C", "C", EQUAL),
    ("ceval_computer_network", "答案：A", "C", NOT),
    ("ceval_computer_network", "选项C错误", "C", NOT),
    ("ceval_law", "A. 甲\nB. 乙\nC. 丙\nD. 丁", "A", NOT),  # the choices written out again
    ("ceval_law", "A. 甲\nB. 乙\nC. 丙\nD. 丁\n故本题选B", "B", EQUAL),
    ("ceval_law", "E", "A", NOT),
    # truthfulqa, lettered
    ("truthfulqa_mc1", " B", "B", EQUAL),
    ("truthfulqa_mc1", "B. The watermelon seeds pass through your digestive system", "B", EQUAL),
    ("truthfulqa_mc1", "M", "M", EQUAL),
    ("truthfulqa_mc1", "I have no comment.", "I", NOT),
    ("truthfulqa_mc1", "You get sick", "B", NOT),
    ("truthfulqa_mc1", "A: nothing happens", "A", EQUAL),
    ("truthfulqa_mc2", " Nothing happens", "Nothing happens\nYou eat watermelon seeds", EQUAL),
    ("truthfulqa_mc2", "You get sick", "Nothing happens\nYou eat watermelon seeds", NOT),
    # arc_challenge: a letter, or the number of a label
    ("arc_challenge", "C", "C", EQUAL),
    ("arc_challenge", "3", "C", EQUAL),
    ("arc_challenge", "(3)", "C", EQUAL),
    ("arc_challenge", "C. Planetary days will become shorter.", "C", EQUAL),
    ("arc_challenge", "E", "E", EQUAL),
    ("arc_challenge", "A meteorite", "A", NOT),
    ("arc_challenge", "Planetary days will become shorter.", "C", NOT),
    ("arc_challenge", "3.5", "C", NOT),
    ("arc_challenge", "30", "C", NOT),
    ("arc_challenge", "2", "C", NOT),
    ("arc_challenge", "B or C", "C", NOT),
    # the training tasks by their own rules
    ("svamp", "76 - 25 #### 51", "51", EQUAL),
    ("svamp", "#### 51.0", "51", EQUAL),
    ("svamp", "#### 22,090,603", "22090603", EQUAL),
    ("svamp", "#### 52", "51", NOT),
    ("svamp", "51", "51", NOT),
    ("strategyqa", " #### yes", "yes", EQUAL),
    ("strategyqa", "#### True.", "yes", EQUAL),
    ("strategyqa", "#### no", "yes", NOT),
    ("math23k", "#### 57/10", "57/10", EQUAL),
    ("math23k", "#### 5.7", "57/10", EQUAL),
    ("math23k", "#### 240%", "2.4", EQUAL),
    ("math23k", "#### 240", "2.4", NOT),
    ("math", "#### \\frac{1}{2}", "\\frac12", EQUAL),
    ("math", "#### \\frac{2}{1}", "\\frac12", NOT),
    ("hotpotqa", "#### Animorphs", "animorphs", EQUAL),
    ("hotpotqa", "#### Animals", "animorphs", NOT),
]  # fmt: skip

MEMBERS = {
    member.name: (evaluation, member) for evaluation in EVALUATIONS.values() for member in evaluation.data.members
}


def is_right(name: str, completion: str, gold: str) -> bool:
    evaluation, member = MEMBERS[name]
    answer = evaluation.extract(member, completion)
    return answer is not None and evaluation.same(member, answer, gold)


@pytest.mark.parametrize(("name", "completion", "gold", "right"), PAIRS)
def test_pairs_judged_by_hand(name: str, completion: str, gold: str, right: bool) -> None:
    assert is_right(name, completion, gold) is right


def test_the_table_is_long_and_no_evaluation_is_left_out() -> None:
    assert len(PAIRS) == len({pair[:3] for pair in PAIRS}) >= 130
    assert {MEMBERS[name][0].name for name, *_ in PAIRS} == set(EVALUATIONS)
    kinds = {KINDS[MEMBERS[name][1].local].name for name, *_ in PAIRS if name.startswith("bbh_")}
    assert kinds == {kind.name for kind in KINDS.values()}
    for evaluation in EVALUATIONS:
        verdicts = {right for name, _, _, right in PAIRS if MEMBERS[name][0].name == evaluation}
        assert verdicts == {EQUAL, NOT}, evaluation


LETTERS_READ: list[tuple[str, str | None]] = [
    ("b, c", None), ("b or c", None), ("b, c and d", None), ("B, a planet", "B"), ("D, e.g. rain", "D"),
    ("I'd say B.", "B"), ("### Answer\nB", "B"), ("The answer\nA planet", None),
    ("b", "B"), ("(b)", "B"), ("B)", "B"), ("[B]", "B"), ("B:", "B"), ("B：光合作用", "B"), ("B.光合作用", "B"),
    ("'B'", "B"), ("\"C\"", "C"), ("`D`", "D"), ("**B**", "B"), ("B!", "B"), ("B because it rains", "B"),
    ("C is correct", "C"), ("The best choice would be C because", "C"), ("Final answer: B", "B"),
    ("$\\boxed{\\text{D}}$", "D"), ("The answer is: B", "B"), ("The answer is B and C.", None),
    ("The answer is A. Wait, the answer is B.", None), ("The answer is not A. The answer is B.", "B"),
    ("(A) is wrong. (B) is correct.", "B"), ("A is correct and B is correct", None),
    ("The answer is either A or B", None), ("Both A and B", None), ("A/B", None), ("B, C", None), ("(A)(C)", None),
    ("A、B", None), ("AB", None), ("A or C", None), ("A planet", None), ("A is a planet", None),
    ("B vitamins", None), ("B-12", None), ("A:B = 2", None), ("e.g. this", None), ("A.I. systems", None),
    ("D.N.A. is", None), ("a planet", None), ("a", "A"), ("the answer is a.", "A"),
    ("The answer is a planet", None), ("The answer is A planet", None), ("None of the above", None),
    ("B is wrong", None), ("B is not correct", None), ("答案为：（B）", "B"), ("选A项", "A"), ("A对B有影响", None),
    ("不能选A", None), ("选择题", None), ("A错误，B正确", "B"), ("因此选择D。", "D"), ("故选：C。", "C"),
    ("B\n\nQuestion: foo\nAnswer: C", "B"), ("2", None), ("", None), (" \n", None), ("B. 25", "B"), ("B 25", None),
    ("Answer: B\n\nExplanation: A is wrong", "B"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "letter"), LETTERS_READ)
def test_letters_judged_by_hand(text: str, letter: str | None) -> None:
    assert read_letter(text) == letter


def test_a_number_stands_for_a_letter_only_where_no_choice_is_a_number() -> None:
    words = write_lettered("Which?", ["dry palms", "wet palms", "oil"], 1, "en")
    numbers = write_lettered("How many?", ["1", "2", "4"], 2, "en")
    assert words.read("2") == words.gold == "B"
    assert numbers.read("2") is None and numbers.read("C") == numbers.gold == "C"
    assert words.read("4") is None and words.read("D") is None


FORMS = (
    "{}",
    "({})",
    "{}.",
    "{}. text",
    " {}\n",
    "The answer is ({}).",
    "答案：{}",
    "答案是{}",
    "选{}",
    "**{}**",
    "\\boxed{{{}}}",
)


@given(st.integers(2, 13), st.data(), st.sampled_from(FORMS))
def test_every_letter_is_read_in_every_form(count: int, data: st.DataObject, form: str) -> None:
    letters = ALPHABET[:count]
    letter = data.draw(st.sampled_from(letters))
    assert read_letter(form.format(letter), letters) == letter
    assert read_letter(form.format("Z"), letters) is None


@given(st.sampled_from(FORMS), st.sampled_from((" and ", " or ", "、", ", ", "/", "和")), st.permutations("ABCD"))
def test_two_letters_are_no_answer(form: str, joint: str, letters: list[str]) -> None:
    assert read_letter(form.format(joint.join(letters[:2]))) is None


@given(st.text(max_size=200), st.sampled_from(sorted(MEMBERS)))
def test_no_text_breaks_a_reader_and_unmarked_text_is_no_answer(text: str, name: str) -> None:
    evaluation, member = MEMBERS[name]
    answer = evaluation.extract(member, text)
    marked = "####" in text or "boxed" in text or "answer is" in text.lower() or evaluation.native == "likelihood"
    assert marked or answer is None


@given(st.text(min_size=1), st.lists(st.text(min_size=1), min_size=2, max_size=6, unique=True), st.randoms())
def test_the_order_of_choices_depends_on_their_content_alone(question: str, choices: list[str], random: object) -> None:
    shown = [choices[i] for i in fixed_order(question, choices)]
    other = list(choices)
    random.shuffle(other)  # type: ignore[attr-defined]
    assert [other[i] for i in fixed_order(question, other)] == shown
    assert sorted(fixed_order(question, choices)) == list(range(len(choices)))


@given(st.integers(2, 8), st.data())
def test_a_lettered_question_knows_its_gold_letter_in_both_orders(count: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, count - 1))
    shown = data.draw(st.permutations(range(count)))
    choices = [f"choice number {i}" for i in range(count)]
    lettered = write_lettered("Which?", choices, right, "en", shown=shown)
    assert lettered.natives[right] == lettered.gold
    assert sorted(lettered.natives) == list(lettered.letters)
    assert lettered.texts[lettered.letters.index(lettered.gold)] == choices[right]
    assert f"\n{lettered.gold}. {choices[right]}\n" in lettered.prompt and lettered.prompt.endswith("Answer:")


def test_members_have_names_of_their_own() -> None:
    names = [member.name for evaluation in EVALUATIONS.values() for member in evaluation.data.members]
    assert len(names) == len(set(names)) == 1 + 1 + 27 + 2 + 2 + 67 + 52 + 1 + 5
    assert isinstance(MEMBERS["bbh_navigate"][1], Member)
