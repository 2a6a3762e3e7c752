//! Rows of figures, the verdicts, and the graph.

use std::fmt::Write as _;
use std::time::Duration;

use super::service::Taken;

const MIB: f64 = 1024.0 * 1024.0;
/// How long after a fault its traces may last.
pub const CALM_AFTER: Duration = Duration::from_secs(30);
/// How old an instance is when its memory has to be flat.
pub const SETTLED: Duration = Duration::from_secs(600);

/// Ten seconds.
#[derive(Default, Clone)]
pub struct Row {
    pub at_s: f64,
    pub instance: u32,
    pub age_s: f64,
    pub faults: String,
    pub is_calm: bool,
    pub per_s: f64,
    pub refused_per_s: f64,
    pub good_refused: u64,
    pub failed: u64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub lines: u64,
    pub counted: u64,
    pub events: usize,
    pub restarts_per_s: f64,
    pub told: u64,
    pub wrong: u64,
    pub stored: Option<u64>,
    pub taken: Taken,
    pub cpu: f64,
    /// Share of the time for which it waited for a core, in percent.
    pub waited: f64,
    pub late_ms: f64,
}

pub const HEAD: &str = "seconds,instance,age_s,faults,calm,requests_per_s,refused_per_s,good_refused,unanswered,p50_ms,p99_ms,lines,suppressed,leaves,restarts_per_s,told,wrong,stored,rss_mib,anonymous_mib,descriptors,threads,written_bytes,files_for_writing,cpu_percent,waited_percent,late_ms";

impl Row {
    pub fn csv(&self) -> String {
        let stored = self.stored.map(|n| n.to_string()).unwrap_or_default();
        format!(
            "{:.0},{},{:.0},{},{},{:.1},{:.1},{},{},{:.1},{:.1},{},{},{},{:.1},{},{},{stored},{:.2},{:.2},{},{},{},{},{:.1},{:.1},{:.1}",
            self.at_s,
            self.instance,
            self.age_s,
            self.faults,
            u8::from(self.is_calm),
            self.per_s,
            self.refused_per_s,
            self.good_refused,
            self.failed,
            self.p50_ms,
            self.p99_ms,
            self.lines,
            self.counted,
            self.events,
            self.restarts_per_s,
            self.told,
            self.wrong,
            self.taken.rss as f64 / MIB,
            self.taken.anonymous as f64 / MIB,
            self.taken.files,
            self.taken.threads,
            self.taken.written,
            self.taken.writable,
            self.cpu,
            self.waited,
            self.late_ms
        )
    }
}

pub struct Verdict {
    pub rule: String,
    pub seen: String,
    /// None where it was too short to say.
    pub kept: Option<bool>,
}

impl Verdict {
    pub fn new(rule: impl Into<String>, seen: impl Into<String>, kept: bool) -> Self {
        Self {
            rule: rule.into(),
            seen: seen.into(),
            kept: Some(kept),
        }
    }

    pub fn maybe(rule: impl Into<String>, seen: Option<(String, bool)>) -> Self {
        let (seen, kept) = seen.map_or(("not long enough".into(), None), |(seen, kept)| (seen, Some(kept)));
        Self {
            rule: rule.into(),
            seen,
            kept,
        }
    }

    pub fn line(&self) -> String {
        let verdict = match self.kept {
            Some(true) => "kept",
            Some(false) => "**MISSED**",
            None => "-",
        };
        format!("| {} | {} | {verdict} |", self.rule, self.seen)
    }
}

/// Memory of instances that are old enough, while nothing is wrong: how far it is from its middle at most.
pub fn flatness(rows: &[Row]) -> Option<(String, bool)> {
    let settled = |row: &&Row| row.is_calm && row.age_s >= SETTLED.as_secs_f64();
    let mut all: Vec<f64> = rows.iter().filter(settled).map(|row| row.taken.rss as f64 / MIB).collect();
    all.sort_by(f64::total_cmp);
    let (first, last) = (*all.first()?, *all.last()?);
    let most = (last - first) / 2.0;
    Some((
        format!("{first:.1} to {last:.1} MiB, ±{most:.1} MiB, in {} samples", all.len()),
        most <= 5.0,
    ))
}

/// Descriptors in the first and in the last third of the rows that count for memory: the quarter that has the fewest, since connections
/// that are kept after a fault go by and by.
pub fn descriptors(rows: &[Row]) -> Option<(String, bool)> {
    let settled = rows
        .iter()
        .filter(|row| row.is_calm && row.at_s >= SETTLED.as_secs_f64() && row.per_s >= 100.0);
    let all: Vec<u64> = settled.map(|row| row.taken.files).collect();
    if all.len() < 12 {
        return None;
    }
    let few = |part: &[u64]| {
        let mut part = part.to_vec();
        part.sort_unstable();
        part[part.len() / 4]
    };
    let (first, last) = (few(&all[..all.len() / 3]), few(&all[all.len() * 2 / 3..]));
    Some((format!("{first} in the first third, {last} in the last"), last <= first + 20))
}

pub fn quantile(sorted: &[Duration], q: f64) -> f64 {
    let at = ((sorted.len() as f64 * q).ceil() as usize).saturating_sub(1);
    sorted.get(at).map_or(0.0, |took| took.as_secs_f64() * 1e3)
}

struct Panel {
    title: &'static str,
    lines: Vec<(&'static str, &'static str, Vec<f64>)>,
}

/// A plain graph: one panel below the other, faults as stripes.
pub fn graph(rows: &[Row], faults: &[(f64, f64, String)], title: &str) -> String {
    const WIDTH: f64 = 960.0;
    const LEFT: f64 = 60.0;
    const HEIGHT: f64 = 110.0;
    const GAP: f64 = 34.0;
    let of = |what: &dyn Fn(&Row) -> f64| rows.iter().map(what).collect::<Vec<_>>();
    // While Redis does not answer, what it said last.
    let mut stored = 0;
    let stored: Vec<f64> = rows
        .iter()
        .map(|row| {
            stored = row.stored.unwrap_or(stored);
            stored as f64
        })
        .collect();
    let panels = [
        Panel {
            title: "requests a second",
            lines: vec![
                ("all", "#1f6feb", of(&|r| r.per_s)),
                ("refused", "#d1242f", of(&|r| r.refused_per_s)),
            ],
        },
        Panel {
            title: "honest requests, ms (at most 10,000)",
            lines: vec![
                ("p99", "#d1242f", of(&|r| r.p99_ms.min(10_000.0))),
                ("p50", "#1f6feb", of(&|r| r.p50_ms.min(10_000.0))),
            ],
        },
        Panel {
            title: "memory, MiB",
            lines: vec![
                ("RSS", "#1f6feb", of(&|r| r.taken.rss as f64 / MIB)),
                ("anonymous", "#8250df", of(&|r| r.taken.anonymous as f64 / MIB)),
            ],
        },
        Panel {
            title: "descriptors",
            lines: vec![("", "#1f6feb", of(&|r| r.taken.files as f64))],
        },
        Panel {
            title: "delegated leaves",
            lines: vec![
                ("at the homeserver", "#1f6feb", of(&|r| r.events as f64)),
                ("in Redis", "#1a7f37", stored),
            ],
        },
        Panel {
            title: "CPU, % of a core",
            lines: vec![("used", "#1f6feb", of(&|r| r.cpu)), ("waited for", "#d1242f", of(&|r| r.waited))],
        },
    ];
    let end = rows.last().map_or(1.0, |row| row.at_s.max(1.0));
    let x = |seconds: f64| LEFT + seconds / end * (WIDTH - LEFT - 10.0);
    let height = 40.0 + panels.len() as f64 * (HEIGHT + GAP);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n<text x=\"{LEFT}\" y=\"16\" font-size=\"13\">{title}</text>\n"
    );
    for (i, panel) in panels.iter().enumerate() {
        let top = 40.0 + i as f64 * (HEIGHT + GAP);
        let most = panel.lines.iter().flat_map(|(_, _, values)| values).copied().fold(1.0, f64::max);
        for (from, to, name) in faults {
            let (from, to) = (x(*from), x(*to));
            let _ = writeln!(
                svg,
                "<rect x=\"{from:.1}\" y=\"{top}\" width=\"{:.1}\" height=\"{HEIGHT}\" fill=\"#fff1c2\"><title>{name}</title></rect>",
                (to - from).max(1.0)
            );
        }
        let _ = writeln!(svg, "<text x=\"{LEFT}\" y=\"{:.1}\">{}</text>", top - 5.0, panel.title);
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {top}V{}H{}\" fill=\"none\" stroke=\"#57606a\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{most:.0}</text><text x=\"{}\" y=\"{}\" text-anchor=\"end\">0</text>",
            top + HEIGHT,
            WIDTH - 10.0,
            LEFT - 5.0,
            top + 9.0,
            LEFT - 5.0,
            top + HEIGHT
        );
        for (n, (name, colour, values)) in panel.lines.iter().enumerate() {
            let points: Vec<String> = rows
                .iter()
                .zip(values)
                .map(|(row, value)| format!("{:.1},{:.1}", x(row.at_s), top + HEIGHT - value / most * HEIGHT))
                .collect();
            let _ = writeln!(svg, "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\"/>", points.join(" "));
            let _ = writeln!(
                svg,
                "<text x=\"{}\" y=\"{:.1}\" fill=\"{colour}\" text-anchor=\"end\">{name}</text>",
                WIDTH - 10.0 - 130.0 * n as f64,
                top - 5.0
            );
        }
    }
    for minute in (0..=(end / 60.0) as u32).filter(|m| m.is_multiple_of(((end / 600.0).ceil() as u32).max(1))) {
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{minute} min</text>",
            x(f64::from(minute) * 60.0),
            height - 18.0
        );
    }
    svg + "</svg>\n"
}
