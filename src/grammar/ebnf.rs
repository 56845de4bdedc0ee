//! Translates EBNF with `::=`, as llama.cpp and XGrammar read it, to Lark.
//!
//! A rule that does not contain itself, however deep, becomes a terminal: one expression that is
//! matched as a whole. Only the others become rules.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::Value;

/// The rule that an output must match.
const ROOT: &str = "root";

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Name(String),
    Defines,
    /// Ready for Lark.
    Atom(String),
    /// `|`, parentheses and repetitions mean the same in Lark.
    Operator(String),
}

/// Whether a client's grammar is of this kind.
pub(super) fn is_ebnf(grammar: &str) -> bool {
    grammar.contains("::=")
}

/// The same grammar in Lark.
pub(super) fn to_lark(grammar: &str) -> Result<String, String> {
    let tokens = Lexer { chars: grammar.chars().collect(), position: 0 }.tokens()?;
    let rules = rules(&tokens)?;
    let index: BTreeMap<&str, usize> =
        rules.iter().enumerate().map(|(index, (name, _))| (*name, index)).collect();
    if index.len() != rules.len() {
        return Err("defines a rule twice".to_owned());
    }
    let root = *index.get(ROOT).ok_or_else(|| format!("defines no rule `{ROOT}`"))?;
    let mut links = Vec::new();
    for (_, body) in &rules {
        let mut targets = Vec::new();
        for token in *body {
            if let Token::Name(name) = token {
                let target = index.get(name.as_str());
                targets.push(*target.ok_or_else(|| format!("does not define the rule `{name}`"))?);
            }
        }
        links.push(targets);
    }
    let is_terminal = terminals(&links);
    let name =
        |rule: usize| if is_terminal[rule] { format!("T{rule}") } else { format!("r{rule}") };
    let mut lark = format!("start: {}\n", name(root));
    for (rule, (_, body)) in rules.iter().enumerate() {
        let _ = write!(lark, "{}:", name(rule));
        for token in *body {
            let text = match token {
                Token::Name(target) => format!(" {}", name(index[target.as_str()])),
                Token::Atom(text) => format!(" {text}"),
                Token::Operator(text) if text == "|" || text == "(" => format!(" {text}"),
                Token::Operator(text) => text.clone(),
                Token::Defines => String::new(),
            };
            lark.push_str(&text);
        }
        lark.push('\n');
    }
    Ok(lark)
}

type Rule<'a> = (&'a str, &'a [Token]);

/// A rule reaches to the name before the next `::=`.
fn rules(tokens: &[Token]) -> Result<Vec<Rule<'_>>, String> {
    let heads: Vec<usize> = (1..tokens.len()).filter(|&i| tokens[i] == Token::Defines).collect();
    if tokens.first() == Some(&Token::Defines) || heads.first() != Some(&1) {
        return Err("must begin with the name of a rule and `::=`".to_owned());
    }
    let ends = heads[1..].iter().map(|next| next - 1).chain([tokens.len()]);
    let rule = |(&head, end): (&usize, usize)| match &tokens[head - 1] {
        Token::Name(name) if head < end => Ok((name.as_str(), &tokens[head + 1..end])),
        _ => Err("`::=` must follow the name of a rule".to_owned()),
    };
    heads.iter().zip(ends).map(rule).collect()
}

/// Which rules never lead back to a rule on the way: found by striking those that only use such
/// rules, each of which may free those that use it.
fn terminals(links: &[Vec<usize>]) -> Vec<bool> {
    let mut users = vec![Vec::new(); links.len()];
    for (rule, targets) in links.iter().enumerate() {
        for &target in targets {
            users[target].push(rule);
        }
    }
    let mut num_open: Vec<usize> = links.iter().map(Vec::len).collect();
    let mut found: Vec<usize> = (0..links.len()).filter(|&rule| num_open[rule] == 0).collect();
    let mut is_terminal = vec![false; links.len()];
    while let Some(rule) = found.pop() {
        is_terminal[rule] = true;
        for &user in &users[rule] {
            num_open[user] -= 1;
            if num_open[user] == 0 {
                found.push(user);
            }
        }
    }
    is_terminal
}

struct Lexer {
    chars: Vec<char>,
    position: usize,
}

impl Lexer {
    fn peek(&self) -> Option<char> {
        self.chars.get(self.position).copied()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek();
        self.position += 1;
        next
    }

    fn take_while(&mut self, is_wanted: impl Fn(char) -> bool) -> String {
        let start = self.position;
        while self.peek().is_some_and(&is_wanted) {
            self.position += 1;
        }
        self.chars[start..self.position].iter().collect()
    }

    fn tokens(mut self) -> Result<Vec<Token>, String> {
        let mut tokens = Vec::new();
        while let Some(first) = self.peek() {
            match first {
                c if c.is_whitespace() => self.position += 1,
                '#' => {
                    self.take_while(|c| c != '\n');
                }
                ':' => {
                    if self.take_while(|c| ":=".contains(c)) != "::=" {
                        return Err("`::=` is expected where there is `:`".to_owned());
                    }
                    tokens.push(Token::Defines);
                }
                '"' => tokens.push(self.literal()?),
                '[' => tokens.push(self.class()?),
                '.' => {
                    self.position += 1;
                    tokens.push(Token::Atom("/(?s:.)/".to_owned()));
                }
                '{' => tokens.push(self.repetition()?),
                '|' | '(' | ')' | '*' | '+' | '?' => {
                    self.position += 1;
                    tokens.push(Token::Operator(first.to_string()));
                }
                c if is_name(c) => tokens.push(Token::Name(self.take_while(is_name))),
                c => return Err(format!("the character `{c}` is not expected here")),
            }
        }
        Ok(tokens)
    }

    fn literal(&mut self) -> Result<Token, String> {
        self.position += 1;
        let mut text = String::new();
        loop {
            match self.next().ok_or("a string does not end")? {
                '"' => return Ok(Token::Atom(Value::from(text).to_string())),
                '\\' => text.push(self.escape()?),
                c => text.push(c),
            }
        }
    }

    fn class(&mut self) -> Result<Token, String> {
        self.position += 1;
        let mut regex = "/[".to_owned();
        if self.peek() == Some('^') {
            self.position += 1;
            regex.push('^');
        }
        let start = regex.len();
        loop {
            match self.next().ok_or("a class of characters does not end")? {
                ']' if regex.len() == start => return Err("a class is empty".to_owned()),
                ']' => return Ok(Token::Atom(regex + "]/")),
                '-' if regex.len() != start && self.peek().is_some_and(|c| c != ']') => {
                    regex.push('-');
                }
                '\\' => {
                    let c = self.escape()?;
                    push_code(&mut regex, c);
                }
                c => push_code(&mut regex, c),
            }
        }
    }

    fn repetition(&mut self) -> Result<Token, String> {
        self.position += 1;
        let range: String =
            self.take_while(|c| c != '}').chars().filter(|c| !c.is_whitespace()).collect();
        self.position += 1;
        let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let (min, max) = range.split_once(',').unwrap_or((&range, &range));
        if !is_number(min) || !(max.is_empty() || is_number(max)) {
            return Err(format!("`{{{range}}}` is not a number of repetitions"));
        }
        Ok(Token::Operator(format!("{{{range}}}")))
    }

    /// What follows a backslash.
    fn escape(&mut self) -> Result<char, String> {
        let kind = self.next().ok_or("a string does not end")?;
        let num_digits = match kind {
            'n' => return Ok('\n'),
            'r' => return Ok('\r'),
            't' => return Ok('\t'),
            'x' => 2,
            'u' => 4,
            'U' => 8,
            c if c.is_ascii_alphanumeric() => return Err(format!("`\\{c}` is unknown")),
            c => return Ok(c),
        };
        let digits: String = (0..num_digits).filter_map(|_| self.next()).collect();
        let code = u32::from_str_radix(&digits, 16).ok().and_then(char::from_u32);
        code.ok_or_else(|| format!("`\\{kind}{digits}` is not a character"))
    }
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == '-'
}

/// By its number, so that nothing in a class has a meaning of its own.
fn push_code(regex: &mut String, c: char) {
    let _ = write!(regex, "\\u{{{:X}}}", u32::from(c));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_become_terminals_unless_they_contain_themselves() {
        let lark = to_lark(
            "# arithmetic\nroot ::= expr \"\\n\"\nexpr ::= num | \"(\" expr (\"+\" | \"-\")\n  expr \")\"\nnum ::= [0-9]{1,3} ws\nws ::= [ \\t]*",
        )
        .unwrap();
        assert_eq!(
            lark,
            "start: r0\nr0: r1 \"\\n\"\nr1: T2 | \"(\" r1 ( \"+\" | \"-\") r1 \")\"\n\
             T2: /[\\u{30}-\\u{39}]/{1,3} T3\nT3: /[\\u{20}\\u{9}]/*\n"
        );
        assert!(to_lark("root ::= \"a\" | \"\\x62\" | [^\"/\\]-]").unwrap().contains("\"b\""));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (grammar, expected) in [
            ("a ::= \"x\"", "`root`"),
            ("root ::= other", "`other`"),
            ("root ::= \"x", "does not end"),
            ("root ::= [a-", "does not end"),
            ("root ::= []", "empty"),
            ("root ::= \"a\"{x}", "repetitions"),
            ("root ::= \"\\q\"", "unknown"),
            ("root ::= \"\\uD800\"", "not a character"),
            ("root ::= 'x'", "not expected"),
            ("root ::= \"x\"\nroot ::= \"y\"", "twice"),
            ("root : \"x\" ::= y", "`::=` is expected"),
            ("::= \"x\"", "begin"),
        ] {
            let error = to_lark(grammar).unwrap_err();
            assert!(error.contains(expected), "{grammar}: {error}");
        }
    }
}
