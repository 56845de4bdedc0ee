//! `strftime` for templates that tell the model the date.

const DAYS: [&str; 7] =
    ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// A date in the Gregorian calendar.
struct Date {
    year: u64,
    /// 1 to 12.
    month: usize,
    /// 1 to 31.
    day: u64,
    /// 1 to 366.
    day_of_year: u64,
    /// 0 is Monday.
    weekday: usize,
}

impl Date {
    fn from_days_since_epoch(days: u64) -> Self {
        let (mut year, mut rest) = (1970, days % (400 * 365 + 97));
        year += days / (400 * 365 + 97) * 400;
        while days_in_year(year) <= rest {
            rest -= days_in_year(year);
            year += 1;
        }
        let day_of_year = rest + 1;
        let mut month = 1;
        while days_in_month(year, month) <= rest {
            rest -= days_in_month(year, month);
            month += 1;
        }
        // The epoch was a Thursday.
        let weekday = ((days + 3) % 7) as usize;
        Self { year, month, day: rest + 1, day_of_year, weekday }
    }
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_in_year(year: u64) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

fn days_in_month(year: u64, month: usize) -> u64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// The UTC time `seconds` after the epoch in Python's `strftime` format, English names. `%-d`
/// leaves out the leading zero; an unknown directive stays as it is.
pub(super) fn format_utc(format: &str, seconds: u64) -> String {
    let date = Date::from_days_since_epoch(seconds / 86_400);
    let second_of_day = seconds % 86_400;
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let mut directive = characters.next();
        let is_unpadded = directive == Some('-');
        if is_unpadded {
            directive = characters.next();
        }
        match directive.and_then(|directive| field(directive, &date, second_of_day)) {
            Some(text) if is_unpadded => {
                let trimmed = text.trim_start_matches('0');
                out.push_str(if trimmed.is_empty() { "0" } else { trimmed });
            }
            Some(text) => out.push_str(&text),
            None => {
                out.push_str(if is_unpadded { "%-" } else { "%" });
                out.extend(directive);
            }
        }
    }
    out
}

fn field(directive: char, date: &Date, second_of_day: u64) -> Option<String> {
    let (hour, minute) = (second_of_day / 3600, second_of_day / 60 % 60);
    let second = second_of_day % 60;
    Some(match directive {
        'Y' => date.year.to_string(),
        'y' => format!("{:02}", date.year % 100),
        'm' => format!("{:02}", date.month),
        'B' => MONTHS[date.month - 1].to_owned(),
        'b' | 'h' => MONTHS[date.month - 1][..3].to_owned(),
        'd' => format!("{:02}", date.day),
        'e' => format!("{:2}", date.day),
        'j' => format!("{:03}", date.day_of_year),
        'A' => DAYS[date.weekday].to_owned(),
        'a' => DAYS[date.weekday][..3].to_owned(),
        'u' => (date.weekday + 1).to_string(),
        'w' => ((date.weekday + 1) % 7).to_string(),
        'H' => format!("{hour:02}"),
        'I' => format!("{:02}", (hour + 11) % 12 + 1),
        'M' => format!("{minute:02}"),
        'S' => format!("{second:02}"),
        'p' => if hour < 12 { "AM" } else { "PM" }.to_owned(),
        'F' => format!("{}-{:02}-{:02}", date.year, date.month, date.day),
        'T' => format!("{hour:02}:{minute:02}:{second:02}"),
        'D' => format!("{:02}/{:02}/{:02}", date.month, date.day, date.year % 100),
        'n' => "\n".to_owned(),
        't' => "\t".to_owned(),
        '%' => "%".to_owned(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: equal to what Python's `datetime.strftime` writes for the same UTC instants.
    #[test]
    fn known_instants() {
        let all = "%Y-%m-%d %H:%M:%S %B %b %A %a %j %y %-d %I %p %u %w";
        let cases = [
            (0, "1970-01-01 00:00:00 January Jan Thursday Thu 001 70 1 12 AM 4 4"),
            (951_827_696, "2000-02-29 12:34:56 February Feb Tuesday Tue 060 00 29 12 PM 2 2"),
            (1_735_689_599, "2024-12-31 23:59:59 December Dec Tuesday Tue 366 24 31 11 PM 2 2"),
            (4_107_542_400, "2100-03-01 00:00:00 March Mar Monday Mon 060 00 1 12 AM 1 1"),
            (13_569_465_600, "2400-01-01 00:00:00 January Jan Saturday Sat 001 00 1 12 AM 6 6"),
        ];
        for (seconds, expected) in cases {
            assert_eq!(format_utc(all, seconds), expected);
        }
    }

    #[test]
    fn other_text_stays() {
        assert_eq!(format_utc("é%% %Q %-Q %F%", 0), "é% %Q %-Q 1970-01-01%");
        assert_eq!(format_utc("%-H", 0), "0");
    }
}
