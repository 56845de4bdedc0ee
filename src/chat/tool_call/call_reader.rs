//! Reads the JSON object of a call, `{"name": …, "arguments": …}`, one character at a time.

/// The text is not the object of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotACall;

/// Finds where a JSON value ends. It does not check the inside: that is its reader's business.
#[derive(Clone, Debug, Default)]
struct ValueScanner {
    depth: usize,
    is_in_string: bool,
    is_escaped: bool,
    is_scalar: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scan {
    /// The character belongs to the value, which goes on.
    Inside,
    /// The character is the value's last.
    Last,
    /// The value ended before this character.
    Behind,
}

impl ValueScanner {
    fn push(&mut self, c: char) -> Scan {
        if self.is_in_string {
            let is_end = !self.is_escaped && c == '"';
            self.is_escaped = !self.is_escaped && c == '\\';
            self.is_in_string = !is_end;
            return if is_end && self.depth == 0 { Scan::Last } else { Scan::Inside };
        }
        if self.is_scalar {
            let is_behind = matches!(c, ',' | '}' | ']') || c.is_whitespace();
            return if is_behind { Scan::Behind } else { Scan::Inside };
        }
        match c {
            '"' => self.is_in_string = true,
            '{' | '[' => self.depth += 1,
            '}' | ']' => {
                self.depth = self.depth.saturating_sub(1);
                if self.depth == 0 {
                    return Scan::Last;
                }
            }
            _ if self.depth == 0 => self.is_scalar = true,
            _ => {}
        }
        Scan::Inside
    }
}

#[derive(Clone, Debug)]
enum State {
    Start,
    /// In front of a key; at the beginning the object may also end.
    BeforeKey {
        is_first: bool,
    },
    Key(ValueScanner),
    Colon,
    BeforeValue,
    Value(ValueScanner),
    AfterValue,
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Member {
    Name,
    Arguments,
    Other,
}

/// Reads the object of a call. The source of an object of arguments is available while it comes;
/// arguments that are a string with an object in it, when they are whole.
#[derive(Clone, Debug)]
pub(super) struct CallReader {
    state: State,
    /// The key or value being read, unless it is an object of arguments.
    buffer: String,
    member: Member,
    name: Option<String>,
    /// Source of arguments that nobody has taken.
    arguments: String,
    has_arguments: bool,
    is_in_arguments: bool,
    has_other_members: bool,
}

impl CallReader {
    pub(super) fn new() -> Self {
        Self {
            state: State::Start,
            buffer: String::new(),
            member: Member::Other,
            name: None,
            arguments: String::new(),
            has_arguments: false,
            is_in_arguments: false,
            has_other_members: false,
        }
    }

    /// The function, once it is known.
    pub(super) fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Whether arguments have begun.
    pub(super) fn has_arguments(&self) -> bool {
        self.has_arguments
    }

    /// Whether the arguments are whole.
    pub(super) fn arguments_ended(&self) -> bool {
        self.has_arguments && !self.is_in_arguments
    }

    /// Whether the object has members that calls do not have.
    pub(super) fn has_other_members(&self) -> bool {
        self.has_other_members
    }

    /// Whether the object has ended.
    pub(super) fn ended(&self) -> bool {
        matches!(self.state, State::Ended)
    }

    /// The source of arguments since the last call of this.
    pub(super) fn take_arguments(&mut self) -> String {
        std::mem::take(&mut self.arguments)
    }

    /// Reads a character of the object.
    pub(super) fn push(&mut self, c: char) -> Result<(), NotACall> {
        match &mut self.state {
            State::Key(scanner) => {
                self.buffer.push(c);
                if scanner.push(c) == Scan::Last {
                    self.end_key()?;
                }
                Ok(())
            }
            State::Value(scanner) => {
                let scan = scanner.push(c);
                self.push_value(c, scan)
            }
            State::Ended => Err(NotACall),
            _ if c.is_whitespace() => Ok(()),
            State::Start if c == '{' => {
                self.state = State::BeforeKey { is_first: true };
                Ok(())
            }
            State::BeforeKey { .. } if c == '"' => {
                self.buffer.push(c);
                let mut scanner = ValueScanner::default();
                scanner.push(c);
                self.state = State::Key(scanner);
                Ok(())
            }
            State::Colon if c == ':' => {
                self.state = State::BeforeValue;
                Ok(())
            }
            State::BeforeValue => self.begin_value(c),
            State::AfterValue if c == ',' => {
                self.state = State::BeforeKey { is_first: false };
                Ok(())
            }
            State::BeforeKey { is_first: true } | State::AfterValue if c == '}' => self.end(),
            _ => Err(NotACall),
        }
    }

    fn end_key(&mut self) -> Result<(), NotACall> {
        let source = std::mem::take(&mut self.buffer);
        let key: String = serde_json::from_str(&source).map_err(|_| NotACall)?;
        self.member = match key.as_str() {
            "name" if self.name.is_none() => Member::Name,
            "arguments" if !self.has_arguments => Member::Arguments,
            _ => Member::Other,
        };
        self.has_other_members |= self.member == Member::Other;
        self.state = State::Colon;
        Ok(())
    }

    fn begin_value(&mut self, c: char) -> Result<(), NotACall> {
        match (self.member, c) {
            (Member::Arguments, '{') => {
                self.has_arguments = true;
                self.is_in_arguments = true;
            }
            // A string with an object in it, or null for none.
            (Member::Arguments, '"' | 'n') | (Member::Name, '"') => {}
            (Member::Arguments | Member::Name, _) | (Member::Other, ',' | '}' | ']' | ':') => {
                return Err(NotACall);
            }
            (Member::Other, _) => {}
        }
        let mut scanner = ValueScanner::default();
        let scan = scanner.push(c);
        self.state = State::Value(scanner);
        self.push_value(c, scan)
    }

    fn push_value(&mut self, c: char, scan: Scan) -> Result<(), NotACall> {
        if scan != Scan::Behind {
            if self.is_in_arguments { &mut self.arguments } else { &mut self.buffer }.push(c);
        }
        if scan == Scan::Inside {
            return Ok(());
        }
        self.end_value()?;
        self.state = State::AfterValue;
        if scan == Scan::Behind { self.push(c) } else { Ok(()) }
    }

    fn end_value(&mut self) -> Result<(), NotACall> {
        if self.is_in_arguments {
            self.is_in_arguments = false;
            return Ok(());
        }
        let source = std::mem::take(&mut self.buffer);
        match self.member {
            Member::Name => {
                self.name = Some(serde_json::from_str(&source).map_err(|_| NotACall)?);
            }
            Member::Arguments => {
                self.arguments = arguments_in(&source).ok_or(NotACall)?;
                self.has_arguments = true;
            }
            Member::Other => {}
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), NotACall> {
        self.state = State::Ended;
        if self.name.is_none() { Err(NotACall) } else { Ok(()) }
    }
}

/// The arguments in a string or null.
fn arguments_in(source: &str) -> Option<String> {
    let text: Option<String> = serde_json::from_str(source).ok()?;
    let Some(text) = text else { return Some("{}".to_owned()) };
    let text = text.trim();
    serde_json::from_str::<serde_json::Map<_, _>>(text).ok().map(|_| text.to_owned())
}
