//! What may be in the log only once: keys, commands, streams.
//!
//! There are as many of them as commands, so they do not stay in memory: full sheets are sorted and laid into
//! unnamed files, and the files are merged at the end. That is when repeats are found.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, Write};

/// How many ids are held before they are laid aside: 24 MB.
const SHEET: usize = 1_000_000;

type Seen = ([u8; 16], i64);

pub(crate) struct Once {
    sheet: Vec<Seen>,
    sheet_max: usize,
    laid_aside: Vec<File>,
}

impl Once {
    pub(crate) fn new() -> Self {
        Self::with_sheets_of(SHEET)
    }

    fn with_sheets_of(sheet_max: usize) -> Self {
        Self { sheet: Vec::new(), sheet_max, laid_aside: Vec::new() }
    }

    pub(crate) fn see(&mut self, id: [u8; 16], position: i64) -> io::Result<()> {
        self.sheet.push((id, position));
        if self.sheet.len() < self.sheet_max {
            return Ok(());
        }
        self.sheet.sort_unstable();
        let mut file = BufWriter::new(tempfile::tempfile()?);
        for (id, position) in self.sheet.drain(..) {
            file.write_all(&id)?;
            file.write_all(&position.to_be_bytes())?;
        }
        let mut file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.rewind()?;
        self.laid_aside.push(file);
        Ok(())
    }

    /// Each position at which something stands that stood before, with the position just before it.
    pub(crate) fn repeats(mut self, mut found: impl FnMut(i64, i64)) -> io::Result<()> {
        self.sheet.sort_unstable();
        let mut last_sheet = self.sheet.into_iter();
        let mut files: Vec<_> = self.laid_aside.into_iter().map(BufReader::new).collect();
        // The least of each pile; the pile past the files is the sheet in memory.
        let in_memory = files.len();
        let mut least = BinaryHeap::new();
        for (pile, file) in files.iter_mut().enumerate() {
            least.extend(next(file)?.map(|seen| Reverse((seen, pile))));
        }
        least.extend(last_sheet.next().map(|seen| Reverse((seen, in_memory))));
        let mut before: Option<Seen> = None;
        while let Some(Reverse((seen, pile))) = least.pop() {
            if let Some((id, position)) = before
                && id == seen.0
            {
                found(position, seen.1);
            }
            before = Some(seen);
            let following = match files.get_mut(pile) {
                Some(file) => next(file)?,
                None => last_sheet.next(),
            };
            least.extend(following.map(|seen| Reverse((seen, pile))));
        }
        Ok(())
    }
}

fn next(file: &mut BufReader<File>) -> io::Result<Option<Seen>> {
    let (mut id, mut position) = ([0; 16], [0; 8]);
    match file.read_exact(&mut id) {
        Ok(()) => {}
        Err(end) if end.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    file.read_exact(&mut position)?;
    Ok(Some((id, i64::from_be_bytes(position))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeat_is_found_within_a_sheet_and_across_sheets() {
        for sheet_max in [1, 2, 3, 7, 100] {
            let mut once = Once::with_sheets_of(sheet_max);
            for (position, id) in (1..).zip([5_u8, 1, 9, 5, 2, 9, 5, 7]) {
                once.see([id; 16], position).unwrap();
            }
            let mut repeats = Vec::new();
            once.repeats(|first, again| repeats.push((first, again))).unwrap();
            assert_eq!(repeats, [(1, 4), (4, 7), (3, 6)], "sheets of {sheet_max}");
        }
    }
}
