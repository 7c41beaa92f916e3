package registry

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the registry's collectors, made once. Their methods are named for
// what happened.
type metrics struct {
	active        *prometheus.GaugeVec
	openedTotal   *prometheus.CounterVec
	closedTotal   *prometheus.CounterVec
	refusedTotal  *prometheus.CounterVec
	bytesTotal    *prometheus.CounterVec
	messagesTotal *prometheus.CounterVec
	duration      *prometheus.HistogramVec
	stateSeconds  *prometheus.HistogramVec
	heldSeconds   *prometheus.HistogramVec
	resumesTotal  *prometheus.CounterVec
	replayedTotal *prometheus.CounterVec
	movesTotal    *prometheus.CounterVec
	idleWarnings  *prometheus.CounterVec
	replayBytes   prometheus.GaugeFunc
	sweepSeconds  prometheus.Histogram
	sweeperFound  prometheus.Counter
}

const (
	namespace = "caddy"
	subsystem = "connections"
)

// ageBuckets are the bounds, in seconds, of the durations in metrics and of the
// ages in Stats: connections live from moments to weeks.
var ageBuckets = []float64{1, 10, 60, 300, 1800, 3600, 14400, 86400, 604800}

// stateBuckets are the bounds, in seconds, of the time spent in a state: dials and
// resumes take milliseconds, open connections days.
var stateBuckets = []float64{0.01, 0.1, 1, 5, 10, 30, 60, 300, 3600, 86400}

// heldBuckets are the bounds, in seconds, of the time without a backend.
var heldBuckets = []float64{0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300}

// sweepBuckets are the bounds, in seconds, of the time that a sweep takes.
var sweepBuckets = []float64{0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1}

func newMetrics(replayBytes func() int64) *metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: subsystem, Name: name, Help: help,
		}, labels)
	}
	histogram := func(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: namespace, Subsystem: subsystem, Name: name, Help: help, Buckets: buckets,
		}, labels)
	}
	return &metrics{
		active: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "active",
			Help: "Connections that exist now.",
		}, []string{"kind", "route", "state"}),
		openedTotal:   counter("opened_total", "Connections that were opened.", "kind", "route"),
		closedTotal:   counter("closed_total", "Connections that had been opened and ended.", "kind", "route", "reason"),
		refusedTotal:  counter("refused_total", "Connections that were refused before they were opened.", "kind", "route", "reason"),
		bytesTotal:    counter("bytes_total", "Payload bytes of data, in: from clients.", "kind", "route", "direction"),
		messagesTotal: counter("messages_total", "Complete WebSocket messages, in: from clients.", "route", "direction"),
		duration:      histogram("duration_seconds", "Life of connections that ended, from their opening.", ageBuckets, "kind", "route"),
		stateSeconds:  histogram("state_seconds", "Time that connections spent in a state they have left.", stateBuckets, "kind", "state"),
		heldSeconds:   histogram("held_seconds", "Time that clients were held without a backend.", heldBuckets, "route"),
		resumesTotal:  counter("resumes_total", "Interruptions that are over, by how: resumed, or the reason of the connection's end.", "route", "result"),
		replayedTotal: counter("replayed_messages_total", "Messages sent again to another backend, which may be repeats.", "route"),
		movesTotal:    counter("migrations_total", "Migrations that are over: moved, stayed (no other backend), lost (the old one went first), or the reason of the connection's end.", "route", "result"),
		idleWarnings:  counter("idle_warnings_total", "Passthrough connections that were warned of before being closed as inactive.", "route"),
		replayBytes: prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "replay_bytes",
			Help: "Memory of all replay buffers together.",
		}, func() float64 { return float64(replayBytes()) }),
		sweepSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "sweep_seconds",
			Help: "Time that the regular look at all connections took.", Buckets: sweepBuckets,
		}),
		sweeperFound: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "sweeper_found_total",
			Help: "Connections that were found long after they should have ended; zero unless there is a bug.",
		}),
	}
}

func (m *metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{
		m.active, m.openedTotal, m.closedTotal, m.refusedTotal, m.bytesTotal, m.messagesTotal,
		m.duration, m.stateSeconds, m.heldSeconds, m.resumesTotal, m.replayedTotal, m.movesTotal, m.idleWarnings, m.replayBytes,
		m.sweepSeconds, m.sweeperFound,
	}
}

// bind makes the series of a route that are counted on the path of every
// message, so that counting needs no lookup.
func (m *metrics) bind(t *Route) {
	for _, d := range []Direction{In, Out} {
		t.bytes[d] = m.bytesTotal.WithLabelValues(string(t.key.kind), t.key.name, d.String())
		if t.key.kind == WebSocket {
			t.messages[d] = m.messagesTotal.WithLabelValues(t.key.name, d.String())
		}
	}
}

// forget deletes the series of a route that is gone.
func (m *metrics) forget(t *Route) {
	labels := prometheus.Labels{"kind": string(t.key.kind), "route": t.key.name}
	m.active.DeletePartialMatch(labels)
	m.openedTotal.DeletePartialMatch(labels)
	m.closedTotal.DeletePartialMatch(labels)
	m.refusedTotal.DeletePartialMatch(labels)
	m.bytesTotal.DeletePartialMatch(labels)
	m.duration.DeletePartialMatch(labels)
	// The rest is of one kind each. A route of the other kind may have got the name.
	own := []interface{ DeletePartialMatch(prometheus.Labels) int }{m.idleWarnings}
	if t.key.kind == WebSocket {
		own = []interface{ DeletePartialMatch(prometheus.Labels) int }{
			m.messagesTotal, m.heldSeconds, m.resumesTotal, m.replayedTotal, m.movesTotal,
		}
	}
	for _, c := range own {
		c.DeletePartialMatch(prometheus.Labels{"route": t.key.name})
	}
}

func (m *metrics) admitted(c *Conn) { m.gauge(c, c.state).Inc() }

func (m *metrics) moved(c *Conn, from, to State) {
	m.gauge(c, from).Dec()
	if to != Closed {
		m.gauge(c, to).Inc()
	}
	spent := time.Since(c.since).Seconds()
	m.stateSeconds.WithLabelValues(string(c.info.Kind), from.String()).Observe(spent)
	switch {
	case from == Held:
		m.heldSeconds.WithLabelValues(c.route.key.name).Observe(spent)
	case from == Migrating && to == Held:
		m.migrated(c.route, "lost")
	}
}

func (m *metrics) resumed(t *Route, result string) {
	m.resumesTotal.WithLabelValues(t.key.name, result).Inc()
}

func (m *metrics) migrated(t *Route, result string) {
	m.movesTotal.WithLabelValues(t.key.name, result).Inc()
}

func (m *metrics) idleWarned(t *Route) { m.idleWarnings.WithLabelValues(t.key.name).Inc() }

func (m *metrics) replayed(t *Route, messages int) {
	if messages > 0 {
		m.replayedTotal.WithLabelValues(t.key.name).Add(float64(messages))
	}
}

func (m *metrics) opened(c *Conn) {
	m.openedTotal.WithLabelValues(string(c.info.Kind), c.route.key.name).Inc()
}

func (m *metrics) closed(c *Conn) {
	kind, route := string(c.info.Kind), c.route.key.name
	m.closedTotal.WithLabelValues(kind, route, string(c.ending.Reason)).Inc()
	m.duration.WithLabelValues(kind, route).Observe(c.since.Sub(c.openedAt).Seconds())
}

func (m *metrics) refused(t *Route, reason string) {
	m.refusedTotal.WithLabelValues(string(t.key.kind), t.key.name, reason).Inc()
}

func (m *metrics) swept(took time.Duration) { m.sweepSeconds.Observe(took.Seconds()) }

func (m *metrics) found() { m.sweeperFound.Inc() }

func (m *metrics) gauge(c *Conn, s State) prometheus.Gauge {
	return m.active.WithLabelValues(string(c.info.Kind), c.route.key.name, s.String())
}
