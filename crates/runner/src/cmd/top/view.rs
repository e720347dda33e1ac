//! What it looks like. Nothing here looks at the host: a frame is a function of [`Data`] and of what keys have chosen.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Margin, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{
    Block, Cell, Clear, Gauge, List, ListItem, Paragraph, Row, Table, TableState, Wrap,
};

use super::data::{Data, Run};
use crate::cmd::gc::Size;
use crate::names::RunId;
use crate::status::{Mode, RecentRun, WorkerState};
use crate::terminal::escape;

const KEYS: &str = " ↑↓ choose  l log  s shell  c cancel  ? help  q quit";
const HELP: &str = " ↑ ↓ k j    choose a run
 l, Enter   follow its log; Ctrl-C leads back
 s          a shell in its VM; its end leads back
 c          cancel it, after a question
 ? h        this page
 q, Ctrl-C  quit

 CPU is of one processor, memory that of the
 VM's process, network towards and from the VM.";

/// What lies above everything else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Overlay {
    #[default]
    None,
    Help,
    /// Whether to cancel this run.
    Confirm(RunId),
}

/// What keys have chosen.
#[derive(Debug, Default)]
pub(super) struct View {
    pub(super) overlay: Overlay,
    selected: Option<RunId>,
    said: String,
}

impl View {
    /// The chosen run.
    pub(super) fn selected(&self) -> Option<RunId> {
        self.selected
    }

    /// Says something in the last line.
    pub(super) fn say(&mut self, text: String) {
        self.said = escape(&text);
    }

    /// A run that has ended is chosen no longer; where there is one, one is chosen.
    pub(super) fn keep_selection(&mut self, data: &Data) {
        let there = |run: RunId| data.runs.iter().any(|one| one.run_id == run);
        if !self.selected.is_some_and(there) {
            self.selected = data.runs.first().map(|run| run.run_id);
        }
        if let Overlay::Confirm(run) = self.overlay
            && !there(run)
        {
            self.overlay = Overlay::None;
        }
    }

    /// Chooses another run.
    pub(super) fn move_by(&mut self, data: &Data, by: isize) {
        let now = self.index(data).unwrap_or(0);
        let last = data.runs.len().saturating_sub(1);
        let next = now.saturating_add_signed(by).min(last);
        self.selected = data.runs.get(next).map(|run| run.run_id);
    }

    fn index(&self, data: &Data) -> Option<usize> {
        let selected = self.selected?;
        data.runs.iter().position(|run| run.run_id == selected)
    }

    /// Draws everything.
    pub(super) fn draw(&self, frame: &mut Frame<'_>, data: &Data) {
        let [title, budget, runs, lower, keys] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Length(4),
            Constraint::Min(4),
            Constraint::Percentage(32),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        frame.render_widget(heading(data), title);
        draw_budget(frame, budget, data);
        self.draw_runs(frame, runs, data);
        let [waiting, recent] =
            Layout::horizontal([Constraint::Percentage(40), Constraint::Percentage(60)])
                .areas(lower);
        frame.render_widget(waiting_vms(data), waiting);
        frame.render_widget(recent_runs(data, recent), recent);
        let last = match self.said.as_str() {
            "" => Line::styled(KEYS, Style::new().fg(Color::DarkGray)),
            said => Line::styled(format!(" {said}"), Style::new().fg(Color::Yellow)),
        };
        frame.render_widget(last, keys);
        match self.overlay {
            Overlay::None => {}
            Overlay::Help => over(frame, " Keys ", HELP, 56, 11),
            Overlay::Confirm(run) => {
                let text = format!(" {run}\n\n y cancels it, any other key does not");
                over(frame, " Cancel this run? ", &text, 46, 5);
            }
        }
    }

    fn draw_runs(&self, frame: &mut Frame<'_>, area: Rect, data: &Data) {
        let title = format!(" {} ", plural(data.runs.len(), "run", "runs"));
        let block = Block::bordered().title(title);
        if data.runs.is_empty() {
            let text = match data.runners.is_empty() {
                true => "no runner of this home runs",
                false => "nothing runs",
            };
            return frame.render_widget(Paragraph::new(text).centered().block(block), area);
        }
        // What stands beside the names of profiles is there on every terminal; those of runners only on wide ones.
        let wide = area.width >= 110;
        let mut names = vec![
            "RUN", "PHASE", "AGE", "PROFILE", "CPU", "MEMORY", "NET ↓", "NET ↑",
        ];
        let mut widths = vec![
            Constraint::Length(if wide { 36 } else { 8 }),
            Constraint::Length(9),
            Constraint::Length(7),
            Constraint::Min(10),
            Constraint::Length(5),
            Constraint::Length(10),
            Constraint::Length(9),
            Constraint::Length(9),
        ];
        if wide {
            names.extend(["SLOT", "RUNNER"]);
            widths.extend([Constraint::Length(4), Constraint::Length(16)]);
        }
        let header = Row::new(names).style(Style::new().add_modifier(Modifier::BOLD));
        let rows = data.runs.iter().map(|run| row(run, wide));
        let table = Table::new(rows, widths)
            .header(header)
            .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED))
            .block(block);
        let mut state = TableState::new().with_selected(self.index(data));
        frame.render_stateful_widget(table, area, &mut state);
    }
}

fn heading(data: &Data) -> Line<'static> {
    let mut spans = vec![Span::styled(
        " runner top ",
        Style::new().add_modifier(Modifier::BOLD),
    )];
    for (name, told) in &data.runners {
        let (text, colour) = match told {
            Err(why) => (format!(" {name}: {}", escape(why)), Color::Red),
            Ok(status) => {
                let mode = match status.mode {
                    Mode::Starting => "starting",
                    Mode::Running => "running",
                    Mode::Draining => "draining",
                    Mode::Stopping => "stopping",
                    Mode::Stopped => "stopped",
                };
                let down = status
                    .proxy
                    .iter()
                    .any(|one| one.state == WorkerState::Down);
                let proxy = if down { ", proxy down" } else { "" };
                let colour = match (status.mode, down) {
                    (_, true) => Color::Red,
                    (Mode::Running, _) => Color::Green,
                    _ => Color::Yellow,
                };
                let waiting = match status.waiting {
                    0 => String::new(),
                    waiting => format!(", {waiting} waiting"),
                };
                (format!(" {name}: {mode}{waiting}{proxy}"), colour)
            }
        };
        spans.push(Span::styled(text, Style::new().fg(colour)));
    }
    Line::from(spans)
}

/// The budget is the host's: each runner tells the same of it.
fn draw_budget(frame: &mut Frame<'_>, area: Rect, data: &Data) {
    let block = Block::bordered().title(" Budget: jobs, and waiting VMs ");
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let Some(status) = data.told().max_by_key(|status| status.updated_at) else {
        return;
    };
    let budget = &status.budget;
    let [cpu, memory] = Layout::vertical([Constraint::Length(1), Constraint::Length(1)])
        .areas(inner.inner(Margin::new(1, 0)));
    for (area, name, firm, waiting, total, unit) in [
        (
            cpu,
            "CPUs  ",
            u64::from(budget.host.firm.vcpu),
            u64::from(budget.host.revocable.vcpu),
            u64::from(budget.total.vcpu),
            "",
        ),
        (
            memory,
            "Memory",
            budget.host.firm.memory_mb,
            budget.host.revocable.memory_mb,
            budget.total.memory_mb,
            " MiB",
        ),
    ] {
        let [label, bar] =
            Layout::horizontal([Constraint::Length(7), Constraint::Min(1)]).areas(area);
        frame.render_widget(Line::from(name), label);
        let percent = firm.saturating_mul(100) / total.max(1);
        let percent = u16::try_from(percent.min(100)).unwrap_or(100);
        let colour = match percent {
            0..=69 => Color::Green,
            70..=89 => Color::Yellow,
            _ => Color::Red,
        };
        let gauge = Gauge::default()
            .gauge_style(Style::new().fg(colour).bg(Color::Black))
            .percent(percent)
            .label(format!("{firm} of {total}{unit}, {waiting} waiting"));
        frame.render_widget(gauge, bar);
    }
}

fn row(run: &Run, wide: bool) -> Row<'static> {
    let id = run.run_id.to_string();
    let id = match wide {
        true => id,
        false => id.get(..8).unwrap_or_default().to_owned(),
    };
    let none = || "-".to_owned();
    let rate = |bytes: u64| format!("{}/s", short(bytes));
    let (down, up) = match run.network {
        Some((down, up)) => (rate(down), rate(up)),
        None => (none(), none()),
    };
    let phase = match run.phase.as_str() {
        "running" => Style::new().fg(Color::Green),
        _ => Style::new().fg(Color::Yellow),
    };
    let mut cells = vec![
        Cell::from(id),
        Cell::from(escape(&run.phase)).style(phase),
        Cell::from(age(run.age_secs)),
        Cell::from(run.profile.clone()),
        Cell::from(run.cpu_percent.map_or_else(none, |cpu| format!("{cpu}%"))),
        Cell::from(
            run.memory
                .map_or_else(none, |bytes| Size(bytes).to_string()),
        ),
        Cell::from(down),
        Cell::from(up),
    ];
    if wide {
        cells.push(Cell::from(run.slot.to_string()));
        cells.push(Cell::from(run.runner.to_string()));
    }
    Row::new(cells)
}

fn waiting_vms(data: &Data) -> List<'static> {
    let mut lines = Vec::new();
    for status in data.told() {
        for pool in &status.warm {
            let making = match pool.preparing {
                0 => String::new(),
                making => format!(", {making} coming"),
            };
            let line = format!(
                " {}: {}/{} warm{making}",
                pool.profile, pool.ready, pool.target
            );
            lines.push(ListItem::new(line));
            if let Some(error) = &pool.last_error {
                let style = Style::new().fg(Color::Red);
                lines.push(ListItem::new(format!("   {}", escape(error))).style(style));
            }
        }
        for idle in &status.idle_vms {
            let since = data.at.saturating_sub(idle.idle_since.unix_secs());
            let session = escape(&idle.session_id.to_string());
            lines.push(ListItem::new(format!(" idle {} {session}", age(since))));
        }
    }
    List::new(lines).block(Block::bordered().title(" Warm and idle VMs "))
}

fn recent_runs(data: &Data, area: Rect) -> List<'static> {
    let rows = usize::from(area.height.saturating_sub(2));
    let lines = data.recent().into_iter().take(rows).map(|run| {
        let (mark, colour) = match (run.exit_code, &run.error) {
            (0, None) => ("✔", Color::Green),
            (_, None) => ("✘", Color::Yellow),
            (_, Some(_)) => ("✘", Color::Red),
        };
        let ago = data.at.saturating_sub(run.ended_at.unix_secs());
        ListItem::new(Line::from(vec![
            Span::styled(format!(" {mark} "), Style::new().fg(colour)),
            Span::raw(told(run, ago)),
        ]))
    });
    List::new(lines).block(Block::bordered().title(" Ended "))
}

fn told(run: &RecentRun, ago: u64) -> String {
    let id = run.run_id.to_string();
    let id = id.get(..8).unwrap_or_default();
    let why = run.error.as_deref().map(escape).unwrap_or_default();
    let (ago, took) = (age(ago), age(run.took_secs));
    format!(
        "{id} {ago:>4} ago in {took:>4} exit {} {why}",
        run.exit_code
    )
}

fn over(frame: &mut Frame<'_>, title: &'static str, text: &str, width: u16, height: u16) {
    let all = frame.area();
    let area = all.centered(
        Constraint::Length(width.min(all.width)),
        Constraint::Length(height.min(all.height)),
    );
    frame.render_widget(Clear, area);
    let text = Paragraph::new(text.to_owned())
        .wrap(Wrap { trim: false })
        .block(Block::bordered().title(title));
    frame.render_widget(text, area);
}

/// A length of time in at most five characters.
fn age(secs: u64) -> String {
    match secs {
        0..=99 => format!("{secs}s"),
        100..=5_999 => format!("{}m", secs / 60),
        6_000..=359_999 => format!("{}h", secs / 3600),
        _ => format!("{}d", secs / 86_400),
    }
}

/// Bytes in at most six characters.
fn short(bytes: u64) -> String {
    match bytes {
        0..=9_999 => format!("{bytes}B"),
        10_000..=9_999_999 => format!("{}k", bytes / 1000),
        _ => format!("{}M", bytes / 1_000_000),
    }
}

fn plural(count: usize, one: &str, several: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { several })
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;

    fn data(runs: usize) -> Data {
        let run = |n: usize| Run {
            run_id: RunId::random(),
            runner: "demo".parse().unwrap(),
            profile: "vm0/small".to_owned(),
            phase: "running".to_owned(),
            age_secs: n as u64 * 97,
            slot: 3,
            cpu_percent: Some(100),
            memory: Some(200 << 20),
            network: Some((12_345, 0)),
        };
        Data {
            runs: (0..runs).map(run).collect(),
            runners: vec![("demo".parse().unwrap(), Err("it \x1b[31mhangs".to_owned()))],
            at: 1,
        }
    }

    fn screen(view: &View, data: &Data, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame, data)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn every_size_can_be_drawn_with_any_number_of_runs() {
        for (width, height) in [(1, 1), (20, 5), (80, 24), (160, 48), (500, 200)] {
            for runs in [0, 1, 300] {
                let data = data(runs);
                let mut view = View::default();
                view.keep_selection(&data);
                for overlay in [
                    Overlay::None,
                    Overlay::Help,
                    Overlay::Confirm(RunId::random()),
                ] {
                    view.overlay = overlay;
                    screen(&view, &data, width, height);
                }
            }
        }
    }

    #[test]
    fn eighty_columns_show_all_figures_and_no_control_characters() {
        let data = data(2);
        let mut view = View::default();
        view.keep_selection(&data);
        let shown = screen(&view, &data, 80, 24);
        for wanted in [
            "RUN",
            "NET ↑",
            "100%",
            "200.0 MiB",
            "12k/s",
            "0B/s",
            "q quit",
        ] {
            assert!(shown.contains(wanted), "{wanted}:\n{shown}");
        }
        assert!(!shown.contains('\x1b'));
        let wide = screen(&view, &data, 160, 48);
        assert!(wide.contains(&data.runs[1].run_id.to_string()), "{wide}");
    }

    #[test]
    fn the_choice_follows_its_run_and_not_its_place() {
        let mut all = data(3);
        let mut view = View::default();
        view.keep_selection(&all);
        view.move_by(&all, 1);
        let chosen = view.selected().unwrap();
        assert_eq!(chosen, all.runs[1].run_id);
        all.runs.remove(0);
        view.keep_selection(&all);
        assert_eq!(view.selected(), Some(chosen));
        view.move_by(&all, 9);
        assert_eq!(view.selected(), Some(all.runs[1].run_id));
        view.overlay = Overlay::Confirm(all.runs[1].run_id);
        all.runs.pop();
        view.keep_selection(&all);
        assert_eq!(
            (view.selected(), view.overlay),
            (Some(chosen), Overlay::None)
        );
    }
}
