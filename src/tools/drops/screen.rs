//! A table on a terminal: redrawn in place, cut to the screen, never longer than it.

/// How large a terminal is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    pub rows: usize,
    pub columns: usize,
}

impl Size {
    /// Of the terminal at stdout; 80 columns of 24 lines where it does not tell.
    pub fn of_stdout() -> Self {
        // SAFETY: winsize is integers: all zeros is a value.
        let mut size: libc::winsize = unsafe { std::mem::zeroed() };
        // SAFETY: the answer's room lives through the call.
        let done = unsafe { libc::ioctl(1, libc::TIOCGWINSZ, &raw mut size) };
        let told = |n: u16, otherwise| match n {
            0 => otherwise,
            n => usize::from(n),
        };
        if done < 0 {
            (size.ws_row, size.ws_col) = (0, 0);
        }
        Self {
            rows: told(size.ws_row, 24),
            columns: told(size.ws_col, 80),
        }
    }
}

/// To the first place, and what is there goes.
const CLEAR: &str = "\x1b[H\x1b[J";

/// A table as it is written to a terminal of this size. The cursor stays below it.
pub fn fit(table: &str, size: Size) -> String {
    let lines: Vec<&str> = table.lines().collect();
    // One line is the cursor's.
    let room = size.rows.saturating_sub(1).max(1);
    let shown = match lines.len() <= room {
        true => lines.len(),
        false => room - 1,
    };
    let mut text = String::from(CLEAR);
    for line in &lines[..shown] {
        text.push_str(&cut(line, size.columns));
        text.push('\n');
    }
    if shown < lines.len() {
        let more = format!("... {} lines more", lines.len() - shown);
        text.push_str(&cut(&more, size.columns));
        text.push('\n');
    }
    text.pop();
    text
}

/// The first `columns` characters, the last of them a mark where there are more.
fn cut(line: &str, columns: usize) -> String {
    if line.chars().count() <= columns {
        return line.to_owned();
    }
    let mut start: String = line.chars().take(columns.saturating_sub(1)).collect();
    start.push('>');
    start
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_cut_to_the_screen() {
        let size = |rows, columns| Size { rows, columns };
        assert_eq!(fit("abc\ndef\n", size(24, 80)), format!("{CLEAR}abc\ndef"));
        assert_eq!(fit("abcdef\nd", size(24, 4)), format!("{CLEAR}abc>\nd"));
        let many = "line\n".repeat(9);
        let text = fit(&many, size(4, 80));
        assert_eq!(text, format!("{CLEAR}line\nline\n... 7 lines more"));
        // A window may be smaller than anything sensible.
        assert!(fit(&many, size(1, 1)).ends_with('>'));
    }
}
