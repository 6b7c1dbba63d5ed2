"""CMMLU (Li et al. 2023) and C-Eval (Huang et al. 2023): Chinese multiple choice, one member a subject, four choices.

C-Eval publishes no answers to its test split; as everywhere its validation split is scored, with examples from dev.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from kvdistill.data.evaluations.base import Evaluation
from kvdistill.data.evaluations.letters import Lettered, list_choices, read_letter, write_lettered
from kvdistill.data.evaluations.rows import Member, PublishedRows, gold_among, gold_column, text_column
from kvdistill.data.sources import RawRow

_LETTERS = "ABCD"
_CMMLU = """
    agronomy anatomy ancient_chinese arts astronomy business_ethics chinese_civil_service_exam chinese_driving_rule
    chinese_food_culture chinese_foreign_policy chinese_history chinese_literature chinese_teacher_qualification
    clinical_knowledge college_actuarial_science college_education college_engineering_hydrology college_law
    college_mathematics college_medical_statistics college_medicine computer_science computer_security
    conceptual_physics construction_project_management economics education electrical_engineering elementary_chinese
    elementary_commonsense elementary_information_and_technology elementary_mathematics ethnology food_science genetics
    global_facts high_school_biology high_school_chemistry high_school_geography high_school_mathematics
    high_school_physics high_school_politics human_sexuality international_law journalism jurisprudence
    legal_and_moral_basis logical machine_learning management marketing marxist_theory modern_chinese nutrition
    philosophy professional_accounting professional_law professional_medicine professional_psychology public_relations
    security_study sociology sports_science traditional_chinese_medicine virology world_history world_religions
"""
_CEVAL = """
    computer_network operating_system computer_architecture college_programming college_physics college_chemistry
    advanced_mathematics probability_and_statistics discrete_mathematics electrical_engineer metrology_engineer
    high_school_mathematics high_school_physics high_school_chemistry high_school_biology middle_school_mathematics
    middle_school_biology middle_school_physics middle_school_chemistry veterinary_medicine college_economics
    business_administration marxism mao_zedong_thought education_science teacher_qualification high_school_politics
    high_school_geography middle_school_politics middle_school_geography modern_chinese_history
    ideological_and_moral_cultivation logic law chinese_language_and_literature art_studies professional_tour_guide
    legal_professional high_school_chinese high_school_history middle_school_history civil_servant sports_science
    plant_protection basic_medicine clinical_medicine urban_and_rural_planner accountant fire_engineer
    environmental_impact_assessment_engineer tax_accountant physician
"""


def read_row(member: Member, row: RawRow, *, question: str, answer: str, fix: str = "") -> dict[str, Any]:
    """The columns named `question` and `answer` (A to D), and the choices `A`, `B`, `C` and `D`."""
    gold = gold_among(row, gold_column(row, answer, fix=fix), _LETTERS, answer)
    choices = {letter: text_column(row, letter) for letter in _LETTERS}
    return {question: text_column(row, question), **choices, answer: gold}


def _subjects(
    name: str,
    title: str,
    *,
    question: str,
    answer: str,
    rows: PublishedRows,
    splits: dict[str, Any],
) -> Evaluation:
    def choices(row: dict[str, Any]) -> list[str]:
        return [row[letter].strip() for letter in _LETTERS]

    def lettered(member: Member, row: dict[str, Any]) -> Lettered:
        return write_lettered(row[question], choices(row), _LETTERS.index(row[answer]), "zh")

    return Evaluation(
        name=name,
        title=title,
        language="zh",
        rows=rows,
        num_fewshot=5,
        native="likelihood",
        fewshot_from="rows",
        splits=splits,
        question=lambda row: f"{row[question].strip()}\n{list_choices(choices(row))}",
        stem=lambda row: str(row[question]),
        gold=lambda member, row: str(row[answer]),
        extract=lambda member, completion: read_letter(completion),
        same=lambda member, answer, gold: answer == gold,
        published_gold=lambda member, row: str(row[answer]),
        lettered=lettered,
    )


def _members(evaluation: str, subjects: str, definition: str) -> tuple[Member, ...]:
    return tuple(Member(f"{evaluation}_{name}", definition.format(name), name, name) for name in subjects.split())


_read_cmmlu = partial(read_row, question="Question", answer="Answer")
_read_ceval = partial(
    read_row,
    question="question",
    answer="answer",
    fix="C-Eval publishes none for its test split: give val/SUBJECT_val.csv",
)

CMMLU = _subjects(
    "cmmlu",
    "CMMLU",
    question="Question",
    answer="Answer",
    splits={"dev": "fewshot", "test": "test"},
    rows=PublishedRows(
        hub="haonan-li/cmmlu",
        members=_members("cmmlu", _CMMLU, "cmmlu/cmmlu_{}.yaml"),
        hub_splits={"test": "test", "fewshot": "dev"},
        paths={
            "test": ("cmmlu/test/{}.csv", "cmmlu/data/test/{}.csv", "cmmlu/{}/test.parquet"),
            "fewshot": ("cmmlu/dev/{}.csv", "cmmlu/data/dev/{}.csv", "cmmlu/{}/dev.parquet"),
        },
        read=_read_cmmlu,
    ),
)
CEVAL = _subjects(
    "ceval",
    "C-Eval (val)",
    question="question",
    answer="answer",
    splits={"dev": "fewshot", "val": "test"},
    rows=PublishedRows(
        hub="ceval/ceval-exam",
        members=_members("ceval", _CEVAL, "ceval/ceval-valid_{}.yaml"),
        hub_splits={"test": "val", "fewshot": "dev"},
        paths={
            "test": (
                "ceval/val/{0}_val.csv",
                "ceval/val/{0}.csv",
                "ceval/formal_ceval/val/{0}_val.csv",
                "ceval/{0}/val.parquet",
            ),
            "fewshot": (
                "ceval/dev/{0}_dev.csv",
                "ceval/dev/{0}.csv",
                "ceval/formal_ceval/dev/{0}_dev.csv",
                "ceval/{0}/dev.parquet",
            ),
        },
        read=_read_ceval,
    ),
)
