"""CMMLU (Li et al. 2023) and C-Eval (Huang et al. 2023): Chinese multiple choice, one member a subject, four choices.

C-Eval publishes no answers to its test split; as everywhere its validation split is scored, with examples from dev.
"""

from __future__ import annotations

from kvdistill.core.quoting import quoted
from kvdistill.data.sets.base import DataSet, Evaluation
from kvdistill.data.sets.letters import list_choices, read_letter, write_lettered
from kvdistill.data.sets.published import Layout, Member, Published, RowDict
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


def _subjects(
    name: str,
    title: str,
    subjects: str,
    *,
    definition: str,
    hub: str,
    layouts: tuple[Layout, ...],
    hub_test: str,
    question: str,
    answer: str,
    no_gold: str = "",
) -> DataSet:
    """Columns `question` and `answer` (A to D) by those names, and the choices `A`, `B`, `C` and `D`.

    hub_test: the split that is scored. no_gold: what to do about rows without an answer.
    """

    def read_columns(member: Member, row: RawRow) -> RowDict:
        gold = row.gold(answer, fix=no_gold)
        if gold not in (*_LETTERS,):
            raise row.error(
                f"the gold answer {quoted(gold)} is not one of {', '.join(_LETTERS)}",
                fix=f"mend column {quoted(answer)}",
            )
        choices = {letter: row.published(letter) for letter in _LETTERS}
        return {question: row.published(question), **choices, answer: gold}

    def choices_of(row: RowDict) -> list[str]:
        return [row[letter].strip() for letter in _LETTERS]

    evaluation = Evaluation(
        title=title,
        language="zh",
        data=Published(
            name=name,
            hub=hub,
            hub_splits={"train": "dev", "test": hub_test},
            layouts=layouts,
            members=tuple(Member(f"{name}_{one}", definition.format(one), one, one) for one in subjects.split()),
            columns=read_columns,
        ),
        num_fewshot=5,
        native="likelihood",
        fewshot_from="rows",
        question=lambda row: f"{row[question].strip()}\n{list_choices(choices_of(row))}",
        stem=lambda row: str(row[question]),
        gold=lambda member, row: str(row[answer]),
        extract=lambda member, completion: read_letter(completion),
        published_gold=lambda member, row: str(row[answer]),
        lettered=lambda member, row: write_lettered(row[question], choices_of(row), _LETTERS.index(row[answer]), "zh"),
    )
    return DataSet(evaluation=evaluation)


CMMLU = _subjects(
    "cmmlu",
    "CMMLU",
    _CMMLU,
    definition="cmmlu/cmmlu_{}.yaml",
    hub="haonan-li/cmmlu",
    layouts=(
        Layout(train="cmmlu/dev/{}.csv", test="cmmlu/test/{}.csv"),
        Layout(train="cmmlu/data/dev/{}.csv", test="cmmlu/data/test/{}.csv"),
        Layout(train="cmmlu/{}/dev.parquet", test="cmmlu/{}/test.parquet"),
    ),
    hub_test="test",
    question="Question",
    answer="Answer",
)
CEVAL = _subjects(
    "ceval",
    "C-Eval (val)",
    _CEVAL,
    definition="ceval/ceval-valid_{}.yaml",
    hub="ceval/ceval-exam",
    layouts=(
        Layout(train="ceval/dev/{0}_dev.csv", test="ceval/val/{0}_val.csv"),
        Layout(train="ceval/dev/{0}.csv", test="ceval/val/{0}.csv"),
        Layout(train="ceval/formal_ceval/dev/{0}_dev.csv", test="ceval/formal_ceval/val/{0}_val.csv"),
        Layout(train="ceval/{0}/dev.parquet", test="ceval/{0}/val.parquet"),
    ),
    hub_test="val",
    question="question",
    answer="answer",
    no_gold="C-Eval publishes none for its test split: give val/SUBJECT_val.csv",
)
