#!/usr/bin/env python3
"""Checks what the build depends on: licences, sources, crates that are banned or were withdrawn.

    python scripts/check-dependencies.py [--advisories CHECKOUT_OF_RUSTSEC_ADVISORY_DB]

The rules are those of deny.toml, so `cargo deny check` says the same where it is installed. This needs
Python and cargo, and no network: whether a version was withdrawn is read from cargo's own copy of
the index, which is as recent as the last time cargo asked for that crate.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys

try:
    import tomllib
except ImportError:
    # Before 3.11. pytest brings it there.
    import tomli as tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]


def packages():
    """Everything in Cargo.lock, for all features and platforms."""
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--all-features"]
    offline = subprocess.run([*command, "--offline"], cwd=ROOT, capture_output=True, text=True)
    result = offline if offline.returncode == 0 else subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"error: {result.stderr.strip()}")
    return json.loads(result.stdout)["packages"]


# Licences ------------------------------------------------------------------------------------------

def is_allowed(expression, allowed):
    """Whether an SPDX expression can be met by what is allowed. `/` is an old way to write OR."""
    words = re.findall(r"\(|\)|[^\s()/]+|/", expression)
    value = either(words, allowed)
    if words:
        raise ValueError(f"`{expression}` is no licence expression")
    return value


def either(words, allowed):
    value = both(words, allowed)
    while words and words[0] in ("OR", "/"):
        words.pop(0)
        # Both sides are read in any case.
        value = both(words, allowed) or value
    return value


def both(words, allowed):
    value = term(words, allowed)
    while words and words[0] == "AND":
        words.pop(0)
        value = term(words, allowed) and value
    return value


def term(words, allowed):
    if not words or words[0] in (")", "OR", "AND", "/"):
        raise ValueError("a licence is missing")
    word = words.pop(0)
    if word == "(":
        value = either(words, allowed)
        if not words or words.pop(0) != ")":
            raise ValueError("a bracket is not closed")
        return value
    if words and words[0] == "WITH":
        words.pop(0)
        word = f"{word} WITH {words.pop(0)}"
    return word in allowed


def check_licences(package, rules):
    allowed = set(rules["allow"])
    for exception in rules["exceptions"]:
        if exception["crate"] == package["name"]:
            allowed |= set(exception["allow"])
    licence = package["license"]
    if not licence:
        return f"says no licence (file: {package['license_file']})"
    try:
        return None if is_allowed(licence, allowed) else f"has the licence {licence}"
    except ValueError as error:
        return f"has the licence `{licence}`: {error}"


# Sources and bans ----------------------------------------------------------------------------------

def check_source(package, rules):
    allowed = {f"registry+{url}" for url in rules["allow-registry"]}
    source = package["source"]
    if source is not None and source not in allowed:
        return f"comes from {source}"
    if source is None and not package["manifest_path"].startswith(str(ROOT)):
        return f"comes from {package['manifest_path']}"
    return None


def check_bans(package, rules):
    if any(banned["crate"] == package["name"] for banned in rules["deny"]):
        return "is banned"
    if package["source"] is None and any(
            dependency["req"] == "*" and not dependency.get("path") for dependency in package["dependencies"]):
        return "depends on any version of something"
    return None


# Withdrawn versions --------------------------------------------------------------------------------

def index_entry(name):
    """What cargo remembers of a crate: one JSON object per version, between zero bytes."""
    folder = {1: "1", 2: "2", 3: f"3/{name[0]}"}.get(len(name), f"{name[:2]}/{name[2:4]}")
    home = pathlib.Path(subprocess.run(
        ["sh", "-c", 'printf %s "${CARGO_HOME:-$HOME/.cargo}"'], capture_output=True, text=True).stdout)
    for path in home.glob(f"registry/index/*/.cache/{folder.lower()}/{name.lower()}"):
        return [json.loads(part) for part in path.read_bytes().split(b"\0") if part.startswith(b"{")]
    return []


def check_yanked(package):
    if package["source"] is None:
        return None
    withdrawn = any(entry["vers"] == package["version"] and entry.get("yanked")
                    for entry in index_entry(package["name"]))
    return "was withdrawn by its authors" if withdrawn else None


# Advisories ----------------------------------------------------------------------------------------

def version_of(text):
    """Comparable; a version before a release is less than the release."""
    main, _, pre = text.strip().partition("+")[0].partition("-")
    numbers = [int(part) for part in main.split(".")]
    return (*numbers, *[0] * (3 - len(numbers))), not pre, pre


def meets(version, requirement):
    """Whether a version is within a requirement as advisories write it: `>= 1.2, < 2`."""
    for part in requirement.split(","):
        operator, number = re.fullmatch(r"\s*(>=|<=|>|<|\^|~|=)?\s*([0-9][^\s]*)\s*", part).groups()
        bound = version_of(number)
        own = version_of(version)
        holds = {
            ">=": own >= bound, "<=": own <= bound, ">": own > bound, "<": own < bound,
            "=": own == bound, "^": own >= bound and compatible(own, bound),
            "~": own >= bound and own[0][:2] == bound[0][:2],
        }[operator or "^"]
        if not holds:
            return False
    return True


def compatible(own, bound):
    """The first number that is not zero is the same."""
    for mine, other in zip(own[0], bound[0]):
        if mine != other:
            return False
        if other:
            return True
    return True


def advisories(folder):
    """Every advisory: the crate's name, its id, its title and requirements that are not affected."""
    for path in sorted(pathlib.Path(folder).glob("crates/*/*.md")):
        found = re.match(r"```toml\n(.*?)\n```", path.read_text(), re.DOTALL)
        about = tomllib.loads(found[1])
        if "withdrawn" in about["advisory"]:
            continue
        versions = about.get("versions", {})
        sound = versions.get("patched", []) + versions.get("unaffected", [])
        notice = about["advisory"].get("informational")
        yield about["advisory"]["package"], about["advisory"]["id"], notice, sound


def check_advisories(all_packages, folder, ignored):
    by_name = {}
    for package in all_packages:
        by_name.setdefault(package["name"], []).append(package)
    for name, identifier, notice, sound in advisories(folder):
        for package in by_name.get(name, []):
            if identifier not in ignored and not any(meets(package["version"], one) for one in sound):
                yield package, f"is affected by {identifier}" + (f" ({notice})" if notice else "")


def self_test():
    """The rules would notice: a check that cannot fail is none."""
    allowed = {"MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"}
    for expression, expected in [
            ("MIT", True), ("GPL-3.0", False), ("MIT OR GPL-3.0", True), ("MIT AND GPL-3.0", False),
            ("MIT/GPL-3.0", True), ("(MIT OR GPL-3.0) AND Apache-2.0", True), ("GPL-3.0 OR (MIT AND X)", False),
            ("Apache-2.0 WITH LLVM-exception", True), ("Apache-2.0 WITH other", False)]:
        assert is_allowed(expression, allowed) == expected, expression
    for version, requirement, expected in [
            ("1.2.3", ">= 1.2.3", True), ("1.2.2", ">= 1.2.3", False), ("0.3.9", "^0.3.4", True),
            ("0.4.0", "^0.3.4", False), ("1.5.0", ">= 1.2, < 1.5", False), ("1.4.9", ">= 1.2, < 1.5", True),
            ("2.0.0-rc.1", ">= 2.0.0", False), ("10.0.0", "> 9.9.9", True)]:
        assert meets(version, requirement) == expected, (version, requirement)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--advisories", metavar="FOLDER", help="a checkout of RustSec's advisory-db")
    options = parser.parse_args()
    self_test()
    rules = tomllib.loads((ROOT / "deny.toml").read_text())
    found = packages()
    complaints = []
    for package in found:
        for complaint in (check_licences(package, rules["licenses"]), check_source(package, rules["sources"]),
                          check_bans(package, rules["bans"]), check_yanked(package)):
            if complaint:
                complaints.append((package, complaint))
    if options.advisories:
        complaints.extend(check_advisories(found, options.advisories, rules["advisories"]["ignore"]))
    for package, complaint in complaints:
        print(f"{package['name']} {package['version']} {complaint}")
    versions = {}
    for package in found:
        versions.setdefault(package["name"], []).append(package["version"])
    twice = [f"{name} ({', '.join(each)})" for name, each in sorted(versions.items()) if len(each) > 1]
    print(f"in several versions: {'; '.join(twice)}")
    known = sum(bool(index_entry(package["name"])) for package in found)
    print(f"{len(found)} crates checked, {known} of them against the index, {len(complaints)} complaints")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
