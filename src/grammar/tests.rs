//! Goal: outputs of a grammar are always valid, whatever is drawn, and triggers open and close it.
//!
//! Method: the small tokenizer of the repository, and walks that draw any allowed token at random.

use std::sync::Arc;

use serde_json::{Value, json};

use super::matcher::{Before, Grammar, GrammarMatcher, Then, Trigger};
use super::{CompileError, Constraint, GrammarCompiler};
use crate::sampling::rng::uniform;
use crate::text::{SpecialTokens, TokenId, Tokenizer};

fn tokenizer() -> Arc<Tokenizer> {
    let json = include_bytes!("../../models/qwen2.5/small_tokenizer.json");
    Arc::new(Tokenizer::from_json(json).unwrap())
}

struct World {
    tokenizer: Arc<Tokenizer>,
    compiler: GrammarCompiler,
    im_end: TokenId,
}

impl World {
    fn new() -> Self {
        let tokenizer = tokenizer();
        let ends = ["<|endoftext|>", "<|im_end|>"].map(|token| tokenizer.id_of(token).unwrap());
        let compiler = GrammarCompiler::new(Arc::clone(&tokenizer), &ends);
        Self { tokenizer, compiler, im_end: ends[1] }
    }

    fn grammar(&self, constraint: &Constraint) -> Arc<Grammar> {
        self.compiler.compile(constraint).unwrap_or_else(|error| panic!("{constraint:?}: {error}"))
    }

    fn error(&self, constraint: &Constraint) -> CompileError {
        match self.compiler.compile(constraint) {
            Err(error) => error,
            Ok(_) => panic!("{constraint:?} was accepted"),
        }
    }

    fn id(&self, token: &str) -> TokenId {
        self.tokenizer.id_of(token).unwrap()
    }

    fn text(&self, tokens: &[TokenId]) -> String {
        self.tokenizer.decode(tokens, SpecialTokens::Keep)
    }

    /// Whether some way through the grammar spells `text`, and it may end there.
    fn accepts(&self, grammar: &Arc<Grammar>, text: &str) -> bool {
        let mut matcher = GrammarMatcher::new(Arc::clone(grammar));
        for byte in text.bytes() {
            let token = (0..4256).find(|&id| self.tokenizer.token_bytes(id) == Some(&[byte]));
            let token = token.expect("every byte is a token");
            // Where more bytes are forced, the mask holds only the usual token.
            if matcher.is_over() || matcher.accept(token).is_err() {
                return false;
            }
        }
        matcher.is_over() || matcher.accept(self.im_end).is_ok()
    }

    /// Draws tokens until the grammar ends. `None` if that takes more than `max_tokens`.
    fn walk(&self, grammar: &Arc<Grammar>, seed: u64, jump: Jump) -> Option<Vec<TokenId>> {
        const MAX_TOKENS: usize = 3000;
        let mut matcher = GrammarMatcher::new(Arc::clone(grammar));
        let mut tokens = Vec::new();
        while tokens.len() < MAX_TOKENS {
            let mask = matcher.mask().unwrap().expect("constrained");
            let allowed: Vec<TokenId> =
                (0..self.tokenizer.vocab_size() as TokenId).filter(|&id| mask.allows(id)).collect();
            let share = uniform(seed, 0, tokens.len());
            // Ending is one choice of two, or strings would never end.
            let token = match allowed.iter().find(|&&id| self.ends_something(id)) {
                Some(&end) if share < 0.5 => end,
                _ => allowed[(share * allowed.len() as f64) as usize],
            };
            matcher.accept(token).unwrap();
            if token == self.im_end || self.tokenizer.is_special(token) {
                assert!(matcher.is_over());
                return Some(tokens);
            }
            tokens.push(token);
            if jump == Jump::Yes {
                tokens.extend(matcher.forced().unwrap());
            }
            if matcher.is_over() {
                return Some(tokens);
            }
        }
        None
    }

    fn ends_something(&self, id: TokenId) -> bool {
        id == self.im_end
            || ["\"", "}", "]"].iter().any(|end| self.tokenizer.id_of(end) == Some(id))
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Jump {
    Yes,
    No,
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 8},
            "kind": {"enum": ["naïve e\u{301}", "中文", 7, null]},
            "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 3},
            "score": {"type": "integer", "minimum": -3, "maximum": 12},
        },
        "required": ["name", "kind", "tags", "score"],
        "additionalProperties": false,
        "$defs": {"tag": {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": "^[a-z]{2}$"}]}},
    })
}

fn check(value: &Value) {
    let object = value.as_object().unwrap();
    let keys: Vec<&str> = object.keys().map(String::as_str).collect();
    assert_eq!(keys, ["name", "kind", "tags", "score"]);
    assert!((1..=8).contains(&object["name"].as_str().unwrap().chars().count()));
    assert!(schema()["properties"]["kind"]["enum"].as_array().unwrap().contains(&object["kind"]));
    // `-0` is an integer too.
    let score = object["score"].as_f64().unwrap();
    assert!((-3.0..=12.0).contains(&score) && score.fract() == 0.0);
    let tags = object["tags"].as_array().unwrap();
    assert!(tags.len() <= 3);
    let is_word = |text: &str| text.len() == 2 && text.bytes().all(|b| b.is_ascii_lowercase());
    assert!(tags.iter().all(|tag| tag.is_boolean() || tag.as_str().is_some_and(is_word)));
}

#[test]
fn random_walks_are_valid_with_and_without_jumps() {
    let world = World::new();
    let grammar = world.grammar(&Constraint::Json(schema()));
    for seed in 0..60 {
        for jump in [Jump::Yes, Jump::No] {
            let tokens = world.walk(&grammar, seed, jump).expect("bounded by its schema");
            let text = world.text(&tokens);
            check(&serde_json::from_str(&text).unwrap_or_else(|error| panic!("{text}: {error}")));
        }
        let (jumped, stepped) =
            (world.walk(&grammar, seed, Jump::Yes), world.walk(&grammar, seed, Jump::No));
        assert_eq!(jumped, stepped, "a jump takes the only way there is");
    }
}

#[test]
fn an_empty_schema_is_any_json_value_and_ends() {
    let world = World::new();
    for constraint in [Constraint::Json(json!({})), Constraint::Json(json!(true))] {
        let grammar = world.grammar(&constraint);
        let mut num_ended = 0;
        for seed in 0..40 {
            let Some(tokens) = world.walk(&grammar, seed, Jump::Yes) else { continue };
            num_ended += 1;
            let text = world.text(&tokens);
            assert!(serde_json::from_str::<Value>(&text).is_ok(), "{text}");
        }
        assert!(30 < num_ended, "{num_ended}");
        for text in ["null", "-1.5e3", "\"a\"", "[]", "{\"a\": [true, {}]}"] {
            assert!(world.accepts(&grammar, text), "{text}");
        }
        assert!(!world.accepts(&grammar, "[1"));
    }
    let object = world.grammar(&Constraint::JsonObject);
    assert!(world.accepts(&object, "{\"a\": 1}"));
    assert!(!world.accepts(&object, "[1]"));
}

#[test]
fn regexes_match_whole_outputs() {
    let world = World::new();
    for regex in [r"\d{3}-[a-f]+", r"^\d{3}-[a-f]+$", r"(?:\d\d\d)-[a-f]{1,}"] {
        let grammar = world.grammar(&Constraint::Regex(regex.into()));
        assert!(world.accepts(&grammar, "123-abc"), "{regex}");
        for wrong in ["x123-abc", "123-", "123-abz", "٣٣٣-a"] {
            assert!(!world.accepts(&grammar, wrong), "{regex} {wrong}");
        }
    }
    let dollar = world.grammar(&Constraint::Regex(r"5\$".into()));
    assert!(world.accepts(&dollar, "5$"));
    let either = world.grammar(&Constraint::Regex("^ab|cd$".into()));
    assert!(world.accepts(&either, "ab") && world.accepts(&either, "cd"));
}

#[test]
fn choices_may_begin_alike_and_hold_anything() {
    let world = World::new();
    let choices = ["a", "ab", "a \"b\"\n/c", "中\\"].map(str::to_owned).to_vec();
    let grammar = world.grammar(&Constraint::Choice(choices.clone()));
    for choice in &choices {
        assert!(world.accepts(&grammar, choice), "{choice}");
    }
    assert!(!world.accepts(&grammar, "abc") && !world.accepts(&grammar, ""));
    for seed in 0..40 {
        let text = world.text(&world.walk(&grammar, seed, Jump::Yes).unwrap());
        assert!(choices.contains(&text), "{text}");
    }
}

#[test]
fn grammars_may_be_lark_or_ebnf() {
    let world = World::new();
    let lark = "start: expr\nexpr: NUM | \"(\" expr \"+\" expr \")\"\nNUM: /[0-9]+/";
    let ebnf =
        "root ::= expr\nexpr ::= num | \"(\" expr \"+\" expr \")\"\nnum ::= [0-9]+ ws\nws ::= [ ]*";
    for grammar in [lark, ebnf] {
        let grammar = world.grammar(&Constraint::Grammar(grammar.into()));
        assert!(world.accepts(&grammar, "((1+23)+4)"));
        assert!(!world.accepts(&grammar, "(1+2"));
        assert!(!world.accepts(&grammar, "1+2"));
    }
}

#[test]
fn what_cannot_be_followed_is_refused() {
    let world = World::new();
    for constraint in [
        Constraint::Json(json!({"type": "string", "minLength": 3, "maxLength": 2})),
        Constraint::Json(json!({"type": "integer", "minimum": 3, "maximum": 2})),
        Constraint::Json(json!({"type": "text"})),
        Constraint::Json(json!({"type": "string", "format": "no-such-format"})),
        Constraint::Json(json!({"type": "string", "pattern": "(?=a)b"})),
        Constraint::Json(json!({"$ref": "#/$defs/none"})),
        Constraint::Json(json!({"allOf": [{"type": "string"}, {"type": "null"}]})),
        Constraint::Json(json!(false)),
        Constraint::Regex(String::new()),
        Constraint::Regex("(".into()),
        Constraint::Regex(r"(a)\1".into()),
        Constraint::Choice(Vec::new()),
        Constraint::Choice(vec!["a".into(), String::new()]),
        Constraint::Grammar("start: undefined_rule".into()),
        Constraint::Grammar(" ".into()),
        Constraint::Grammar(format!("start: {}\"a\"{}", "(".repeat(5000), ")".repeat(5000))),
        Constraint::Grammar("x".repeat(600 << 10)),
    ] {
        world.error(&constraint);
    }
    let CompileError::Invalid { part, .. } =
        world.error(&Constraint::Json(json!({"properties": {"a": {"not": {}}}})))
    else {
        panic!("the wrong kind of error");
    };
    assert_eq!(part, ".properties.a.not");
}

#[test]
fn equal_constraints_share_a_grammar_and_old_ones_are_forgotten() {
    let world = World::new();
    let constraint = |n: u32| Constraint::Regex(format!("a{{{n}}}"));
    let first = world.grammar(&constraint(1));
    assert!(Arc::ptr_eq(&first, &world.grammar(&constraint(1))));
    for n in 2..70 {
        world.grammar(&constraint(n));
    }
    assert!(!Arc::ptr_eq(&first, &world.grammar(&constraint(1))));
    assert_eq!(world.compiler.num_cached(), 64);
}

#[test]
fn deep_and_wide_schemas_compile_on_a_deep_stack() {
    let world = World::new();
    let deep = (0..100).fold(
        json!({"type": "null"}),
        |inner, _| json!({"type": "object", "properties": {"a": inner}, "required": ["a"]}),
    );
    world.grammar(&Constraint::Json(deep));
    let wide: serde_json::Map<String, Value> =
        (0..1500).map(|i| (format!("key{i}"), json!({"type": "integer"}))).collect();
    world.grammar(&Constraint::Json(json!({"type": "object", "properties": wide})));
}

fn call_grammar(world: &World) -> Arc<Grammar> {
    let lark = r#"start: "\n{\"n\": " NUMBER "}\n" </tool_call>
NUMBER: /[1-9][0-9]{0,2}/"#;
    world.grammar(&Constraint::Lark(lark.into()))
}

#[test]
fn a_repeating_trigger_constrains_each_call_and_nothing_else() {
    let world = World::new();
    let (open, close) = (world.id("<tool_call>"), world.id("</tool_call>"));
    let trigger = Trigger { token: open, before: Before::MayEnd, then: Then::Repeat };
    let grammar = Arc::new(call_grammar(&world).after(trigger));
    let mut matcher = GrammarMatcher::new(grammar);
    for round in 0..2 {
        for &token in &world.tokenizer.encode("some free text").unwrap() {
            assert_eq!(matcher.mask().unwrap(), None, "free text costs nothing");
            matcher.accept(token).unwrap();
            assert!(matcher.forced().unwrap().is_empty());
        }
        matcher.accept(open).unwrap();
        let forced = matcher.forced().unwrap();
        assert!(world.text(&forced).starts_with("\n{\"n\":"), "{:?}", world.text(&forced));
        let mut inside = forced;
        while inside.last() != Some(&close) {
            let mask = matcher.mask().unwrap().expect("constrained");
            assert!(!mask.allows(world.im_end) && !mask.allows(open));
            let seven = world.id("7");
            let next = (0..4278).find(|&id| mask.allows(id)).unwrap();
            let token = if mask.allows(seven) && round == 0 { seven } else { next };
            matcher.accept(token).unwrap();
            inside.push(token);
            inside.extend(matcher.forced().unwrap());
        }
        let text = world.text(&inside);
        let body = text.strip_suffix("</tool_call>").unwrap();
        assert!(serde_json::from_str::<Value>(body).unwrap()["n"].is_u64(), "{text}");
        assert!(!matcher.is_over());
    }
    assert_eq!(matcher.mask().unwrap(), None);
    matcher.accept(world.im_end).unwrap();
    assert!(!matcher.is_over(), "the stop token itself ends free text");
}

#[test]
fn a_trigger_that_must_be_reached_forbids_the_end_before_it() {
    let world = World::new();
    let trigger =
        Trigger { token: world.id("</tool_call>"), before: Before::MustReach, then: Then::End };
    let grammar = world.grammar(&Constraint::Choice(vec!["yes".into(), "no".into()]));
    let mut matcher = GrammarMatcher::new(Arc::new(grammar.after(trigger)));
    let mask = matcher.mask().unwrap().expect("held");
    assert!(!mask.allows(world.im_end) && !mask.allows(world.id("<|endoftext|>")));
    assert_eq!(mask.num_allowed(), world.tokenizer.vocab_size() - 2);
    matcher.accept(world.id("a")).unwrap();
    matcher.accept(world.id("</tool_call>")).unwrap();
    let mask = matcher.mask().unwrap().expect("constrained");
    assert!(mask.allows(world.id("y")) && !mask.allows(world.id("a")));
    for &token in &world.tokenizer.encode("yes").unwrap() {
        assert!(!matcher.is_over());
        matcher.accept(token).unwrap();
    }
    assert!(matcher.is_over());
}

#[test]
fn special_tokens_are_never_part_of_text() {
    let world = World::new();
    let grammar = world.grammar(&Constraint::Regex("(?s:.)*".into()));
    let mask = GrammarMatcher::new(grammar).mask().unwrap().unwrap();
    for token in ["<|im_start|>", "<tool_call>", "<|fim_prefix|>"] {
        assert!(!mask.allows(world.id(token)), "{token}");
    }
    assert!(mask.allows(world.im_end) && mask.allows(world.id("a")));
}

#[test]
fn a_token_outside_of_the_mask_is_an_error_for_good() {
    let world = World::new();
    let grammar = world.grammar(&Constraint::Choice(vec!["yes".into()]));
    let mut matcher = GrammarMatcher::new(Arc::clone(&grammar));
    assert!(matcher.accept(world.id("n")).is_err());
    assert!(matcher.mask().is_err() && matcher.accept(world.id("y")).is_err());
    let mut other = GrammarMatcher::new(grammar);
    assert!(other.mask().is_ok(), "others go on");
}

/// Definitions each of which is the next.
fn chain_of_references(num: usize) -> Value {
    let mut definitions = serde_json::Map::new();
    for index in 0..num {
        let next = format!("#/$defs/{:x}", index + 1);
        definitions.insert(format!("{index:x}"), json!({"$ref": next}));
    }
    definitions.insert(format!("{num:x}"), json!({"type": "null"}));
    json!({"$ref": "#/$defs/0", "$defs": definitions})
}

// A stack that overflows ends the whole process, and a request must never do that.
#[test]
fn constraints_that_lead_deep_end_on_any_stack() {
    let world = World::new();
    world.grammar(&Constraint::Json(chain_of_references(200)));
    let deep = chain_of_references(14_000);
    world.error(&Constraint::Json(deep.clone()));
    let rules = |define: &str| -> String {
        let rule = |rule| format!("a{rule} {define} a{}\n", rule + 1);
        (0..20_000).map(rule).collect::<Vec<_>>().concat()
    };
    let (ebnf, lark) = (rules("::="), rules(":"));
    let terminals = lark.replace('a', "A");
    for constraint in [
        Constraint::Grammar(format!("root ::= a0\n{ebnf}a20000 ::= \"x\"")),
        Constraint::Grammar(format!("start: a0\n{lark}a20000: \"x\"")),
        Constraint::Grammar(format!("start: A0\n{terminals}A20000: \"x\"")),
        Constraint::Grammar(format!("start: %json {deep}")),
        Constraint::Regex(format!("{}a{}", "(".repeat(100_000), ")".repeat(100_000))),
        Constraint::Regex("((a{1000}){1000}){1000}".into()),
    ] {
        // Whether it is accepted is not the point.
        let _ = world.compiler.compile(&constraint);
    }
}
