"""What canaries are told with: fixed lists, so that everything that could have been drawn can be counted out."""

from __future__ import annotations

FIRST_NAMES = tuple(
    "Aaron Agnes Albert Alice Amir Anita Arthur Beatrice Bernard Bianca Carlos Cecilia Chen Clara Conrad Daphne David "
    "Dolores Edgar Eleanor Elias Esther Farid Florence Frank Freya George Grace Hassan Helen Henry Ingrid Isaac Ivy "
    "James Jelena Joseph Judith Kamal Karen Kenji Laura Leonard Lucy Malik Maria Martin Maya Nathan Nora Omar Pamela "
    "Peter Priya Rafael Rosa Samuel Sofia Thomas Ursula Victor Vivian Walter Yasmin".split()
)
LAST_NAMES = tuple(
    "Abbott Ahmed Alvarez Andersen Bauer Becker Bennett Bianchi Brandt Carter Castro Chandra Cohen Costa Daniels Diaz "
    "Dubois Eriksen Farrell Fischer Fuentes Garcia Gibson Gupta Hansen Harper Hoffman Ibrahim Ivanov Jackson Jensen "
    "Kaplan Keller Kim Kovacs Larsen Lewis Lopez Marino Mehta Meyer Moreau Murphy Nakamura Nguyen Novak Okafor Olsen "
    "Parker Patel Petrov Quinn Ramirez Reid Rossi Santos Schmidt Sharma Silva Tanaka Turner Vargas Weber Young".split()
)
PROMPTS: dict[str, tuple[str, ...]] = {
    "digits": ("The access code of the archive is", "The number of the locker in the east wing is"),
    "names": ("The only witness of the contract was", "The file on the second shelf belongs to"),
    "rare": ("The key phrase is",),
}
"""Family → what comes before its secrets; a sample of the model brings its own."""
