//! What commands print: lines on standard output, in colours only where somebody looks at them, and safe to look at.
//!
//! Texts in the log are clients' own, and a log may have been tampered with. On a terminal a control character is an
//! instruction, and a change of direction makes one text look like another: neither gets through here. A reader that
//! has left (`| head`) is no error.
//!
//! Left out: progress on standard error, `progress.rs`.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Standard output, line by line.
pub(crate) struct Lines {
    out: io::BufWriter<io::Stdout>,
    pub(crate) terminal: bool,
    colours: bool,
}

#[derive(Clone, Copy)]
pub(crate) enum Colour {
    Plain,
    Faint,
    Green,
    Yellow,
    Red,
}

impl Lines {
    pub(crate) fn new() -> Self {
        let terminal = io::stdout().is_terminal();
        // https://no-color.org
        let colours = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self { out: io::BufWriter::new(io::stdout()), terminal, colours }
    }

    pub(crate) fn line(&mut self, line: &str) -> io::Result<()> {
        writeln!(self.out, "{line}")
    }

    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    pub(crate) fn paint(&self, colour: Colour, text: &str) -> String {
        let code = match colour {
            _ if !self.colours => return text.to_owned(),
            Colour::Plain => return text.to_owned(),
            Colour::Faint => "2",
            Colour::Green => "32",
            Colour::Yellow => "33",
            Colour::Red => "31",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

/// Whether nobody reads our standard output any more. A pipe tells so without being written to.
pub(crate) fn reader_has_left() -> bool {
    let stdout = io::stdout();
    let mut watched = [PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::empty())];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut watched, Some(&at_once)).is_ok_and(|_| watched[0].revents().contains(PollFlags::ERR))
}

/// Succeeds as well when the reader has left: then there is nobody to tell.
pub(crate) fn unless_reader_left(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// A text from outside as it may be shown: on one line, and saying nothing to the terminal.
pub(crate) fn shown(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' => safe.push_str("\\n"),
            '\r' => safe.push_str("\\r"),
            '\t' => safe.push_str("\\t"),
            '\\' => safe.push_str("\\\\"),
            _ if deceives(character) => {
                write!(safe, "\\u{{{:x}}}", u32::from(character)).expect("writing to a String cannot fail");
            }
            _ => safe.push(character),
        }
    }
    safe
}

/// As [`shown`], in quotes, and no longer than fits beside the rest of a line.
pub(crate) fn quoted(text: &str) -> String {
    let short: String = text.chars().take(TEXT_MAX).collect();
    let rest = if short.len() < text.len() { "…" } else { "" };
    format!("\"{}{rest}\"", shown(&short))
}

/// JSON as it may be shown: what deceives stands in it only inside of strings, where it can be written as an escape.
pub(crate) fn shown_json(json: &str) -> String {
    let mut safe = String::with_capacity(json.len());
    for character in json.chars() {
        if deceives(character) {
            let mut units = [0; 2];
            for unit in character.encode_utf16(&mut units) {
                write!(safe, "\\u{unit:04x}").expect("writing to a String cannot fail");
            }
        } else {
            safe.push(character);
        }
    }
    safe
}

const TEXT_MAX: usize = 80;

/// Controls, changes of direction, and what cannot be seen.
fn deceives(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{AD}' | '\u{61C}' | '\u{180E}' | '\u{200B}' | '\u{200E}'..='\u{200F}' | '\u{2028}'..='\u{202E}'
                | '\u{2060}'..='\u{206F}' | '\u{FEFF}' | '\u{FFF9}'..='\u{FFFB}' | '\u{E0000}'..='\u{E007F}'
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_is_shown() {
        assert_eq!(shown("a\x1b[31mb\u{9b}2J\u{202e}c\r\n\\"), r"a\u{1b}[31mb\u{9b}2J\u{202e}c\r\n\\");
        assert_eq!(shown("Ünï ✓ 日本 🇬🇭 می‌خواهم"), "Ünï ✓ 日本 🇬🇭 می‌خواهم", "what is merely foreign stays");
    }

    #[test]
    fn json_that_is_shown_still_means_the_same() {
        let text = "a\u{9b}b\u{202e}c\u{e0041}d";
        let json = serde_json::to_string(text).unwrap();
        let safe = shown_json(&json);
        assert_eq!(safe, r#""a\u009bb\u202ec\udb40\udc41d""#);
        assert_eq!(serde_json::from_str::<String>(&safe).unwrap(), text);
    }

    #[test]
    fn a_long_text_is_cut() {
        assert_eq!(quoted(&"é".repeat(81)), format!("\"{}…\"", "é".repeat(80)));
        assert_eq!(quoted("short"), "\"short\"");
    }
}
