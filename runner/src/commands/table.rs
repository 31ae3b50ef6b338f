//! Columns of text.

/// Lines up the cells of `rows` in columns, two spaces apart. Wide text in the last column stays as it is.
pub(super) fn format(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            rows.iter().filter_map(|row| row.get(column)).map(|cell| width(cell)).max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, column_width) in row.iter().zip(&widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', column_width.saturating_sub(width(cell)) + 2));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn width(cell: &str) -> usize {
    cell.chars().count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_have_no_spaces_at_their_end() {
        let rows = [
            vec!["ID".into(), "NAME".into()],
            vec!["é12345".into(), "x".into()],
            vec!["1".into(), String::new()],
        ];
        assert_eq!(format(&rows), "ID      NAME\né12345  x\n1\n");
        assert_eq!(format(&[]), "");
    }
}
