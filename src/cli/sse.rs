//! Takes server-sent events apart, however the network cuts them.

/// The longest event accepted; answers come in events of a few hundred bytes.
const MAX_EVENT_BYTES: usize = 16 << 20;

/// Turns bytes into the data of events. Comments and fields other than `data` are dropped.
#[derive(Debug, Default)]
pub(crate) struct SseParser {
    line: Vec<u8>,
    /// The data lines of the event so far.
    data: Option<String>,
    /// The last byte was a carriage return, so that a line feed belongs to it.
    is_after_return: bool,
}

/// The stream is no reasonable event stream.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server sent an event of more than {MAX_EVENT_BYTES} bytes")]
pub(crate) struct EventTooLong;

impl SseParser {
    /// Reads further bytes; the data of every event they complete goes to `events`.
    pub(crate) fn push(
        &mut self,
        bytes: &[u8],
        events: &mut Vec<String>,
    ) -> Result<(), EventTooLong> {
        for &byte in bytes {
            match byte {
                b'\n' if self.is_after_return => {}
                b'\n' | b'\r' => self.end_line(events),
                _ => self.line.push(byte),
            }
            self.is_after_return = byte == b'\r';
            if MAX_EVENT_BYTES < self.line.len() + self.data.as_ref().map_or(0, String::len) {
                return Err(EventTooLong);
            }
        }
        Ok(())
    }

    fn end_line(&mut self, events: &mut Vec<String>) {
        if self.line.is_empty() {
            events.extend(self.data.take());
            return;
        }
        let line = String::from_utf8_lossy(&self.line);
        if let Some(value) = line.strip_prefix("data:") {
            let value = value.strip_prefix(' ').unwrap_or(value);
            match &mut self.data {
                Some(data) => {
                    data.push('\n');
                    data.push_str(value);
                }
                None => self.data = Some(value.to_owned()),
            }
        }
        self.line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = ": keep-alive\n\ndata: {\"a\":\"é😀\"}\n\nevent: x\r\nid:1\r\n\
                          data:two\r\ndata: lines\r\n\r\nretry: 5\n\ndata:\n\ndata: [DONE]\r\r";

    fn parse<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<String> {
        let (mut parser, mut events) = (SseParser::default(), Vec::new());
        for piece in pieces {
            parser.push(piece, &mut events).unwrap();
        }
        events
    }

    #[test]
    fn events_do_not_depend_on_where_the_stream_is_cut() {
        let expected = ["{\"a\":\"é😀\"}", "two\nlines", "", "[DONE]"];
        let bytes = STREAM.as_bytes();
        assert_eq!(parse([bytes]), expected);
        assert_eq!(parse(bytes.chunks(1)), expected);
        for cut in 0..bytes.len() {
            assert_eq!(parse([&bytes[..cut], &bytes[cut..]]), expected, "{cut}");
        }
    }

    #[test]
    fn an_event_is_only_whole_at_its_blank_line() {
        assert!(parse([b"data: 1\n".as_slice()]).is_empty());
        assert!(parse([b"data: 1".as_slice()]).is_empty());
    }

    #[test]
    fn endless_events_are_refused() {
        let mut parser = SseParser::default();
        let piece = vec![b'x'; 1 << 20];
        let refused = (0..17).find_map(|_| parser.push(&piece, &mut Vec::new()).err());
        assert_eq!(refused, Some(EventTooLong));
    }
}
