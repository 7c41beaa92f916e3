// Package settings holds the groups of settings that the handlers have in common,
// as they stand in JSON, with their defaults and their checks. Unset is not zero:
// unset means the default.
package settings

import (
	"fmt"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
	"github.com/holdfast-proxy/caddy-holdfast/internal/replay"
	"github.com/holdfast-proxy/caddy-holdfast/internal/session"
)

// Defaults.
const (
	DialTimeout       = 3 * time.Second
	HandshakeTimeout  = 10 * time.Second
	PingInterval      = 30 * time.Second
	PingTimeout       = 30 * time.Second
	WriteTimeout      = 30 * time.Second
	ResumeTimeout     = 30 * time.Second
	ResumeMin         = 100 * time.Millisecond
	ResumeMax         = 5 * time.Second
	ResumeConcurrency = 64
	ResumeLimit       = 3
	ReplayBuffer      = 5 << 20
	DrainWindow       = 10 * time.Second
)

// resumeOn are the close codes that say by default that a backend goes away, and
// not that the conversation is over.
var resumeOn = []uint16{1001, 1012, 1013}

// Transport has the settings of connecting to an upstream.
type Transport struct {
	// How long a TCP connect may take. It must be positive.
	// Default: `3s`.
	DialTimeout *caddy.Duration `json:"dial_timeout,omitempty"`

	// How long an upstream, once connected, may take to answer the handshake.
	// It must be positive.
	// Default: `10s`.
	HandshakeTimeout *caddy.Duration `json:"handshake_timeout,omitempty"`

	// TLS to all upstreams whose scheme does not say otherwise, with these settings,
	// which are reverse_proxy's. Upstreams with wss or https have TLS also without.
	// Default: none.
	TLS *reverseproxy.TLSConfig `json:"tls,omitempty"`

	// The version of the PROXY protocol with whose header each connection to an
	// upstream begins: `v1` or `v2`. It says who the client is.
	// Default: no header.
	ProxyProtocol string `json:"proxy_protocol,omitempty"`
}

// KeepAlive has the settings of live connections.
type KeepAlive struct {
	// How often each peer is sent a ping; up to 10 % sooner. Zero sends none, and
	// messages count as delivered once a backend's kernel has had them for
	// ping_timeout.
	// Default: `30s`.
	PingInterval *caddy.Duration `json:"ping_interval,omitempty"`

	// How long a peer may be silent after a ping, all of that while the proxy
	// reads from it, before it is taken for dead. It must be positive.
	// Default: `30s`.
	PingTimeout *caddy.Duration `json:"ping_timeout,omitempty"`

	// How long a connection may go without a data frame either way. Zero: for ever.
	// Default: `0`.
	IdleTimeout *caddy.Duration `json:"idle_timeout,omitempty"`

	// How long a connection may go without its first data frame. Zero: for ever.
	// Default: `0`.
	FirstDataTimeout *caddy.Duration `json:"first_data_timeout,omitempty"`

	// How long a connection may live; shortened by up to 10 % at random. Zero:
	// for ever.
	// Default: `0`.
	MaxLifetime *caddy.Duration `json:"max_lifetime,omitempty"`

	// How long a peer's kernel may take no byte of what is written to it. Zero:
	// for ever.
	// Default: `30s`.
	WriteTimeout *caddy.Duration `json:"write_timeout,omitempty"`
}

// Resume has the settings of what happens when a backend is lost.
type Resume struct {
	// How long a client may be held without a backend before it is closed with
	// code 1013 (try again later). Zero turns holding off: losing the backend
	// then closes the client at once, with 1014.
	// Default: `30s`.
	Timeout *caddy.Duration `json:"timeout,omitempty"`

	// The bound of the random pause before the first re-dial; it doubles with
	// each further one. It must be positive.
	// Default: `100ms`.
	MinInterval *caddy.Duration `json:"min_interval,omitempty"`

	// What that bound grows to. It must not be smaller than min_interval.
	// Default: `5s`, or min_interval if that is longer.
	MaxInterval *caddy.Duration `json:"max_interval,omitempty"`

	// How many clients may re-dial one upstream at once; the others wait for
	// their turn. It must be positive.
	// Default: `64`.
	Concurrency *int `json:"concurrency,omitempty"`

	// The close codes of a backend that mean that it goes away: the client is held,
	// as when the connection breaks. Any other close frame goes to the client. An
	// empty list leaves only broken connections.
	// Default: `[1001, 1012, 1013]`.
	CloseCodes *[]uint16 `json:"close_codes,omitempty"`

	// How many backends in a row may break with the same message in hand before
	// its client is closed, with code 1011. Zero: any number.
	// Default: `3`.
	Limit *int `json:"limit,omitempty"`
}

// Replay has the settings of what the next backend gets of what the client sent.
type Replay struct {
	// What the next backend gets first: `unacked`, all that the lost one is not
	// known to have read (at least once); `unsent`, all that was never completely
	// written (at most once); `strict`, like unsent, but a client with a message in
	// doubt is closed with code 1012; `off`, nothing.
	// Default: `unacked`.
	Mode string `json:"mode,omitempty"`

	// How many bytes are kept of one connection's messages. A larger message is
	// passed on, but cannot be replayed. It must be positive.
	// Default: 5 MiB.
	Buffer *int64 `json:"buffer,omitempty"`

	// What happens when they do not fit: `pause` stops reading from the client;
	// `close` does so while there is a backend, and closes a client that is
	// held, with code 1013.
	// Default: `pause`.
	Overflow string `json:"overflow,omitempty"`
}

// Limits has the bounds of a route's connections and of their messages.
type Limits struct {
	// How many connections the route may have at once; one more is refused with
	// status 503. Zero: any number, and what connection_registry allows in all does
	// not count for them.
	// Default: as many as connection_registry allows.
	MaxConnections *int `json:"max_connections,omitempty"`

	// How many of them one client IP may have; one more is refused with status 429.
	// Zero: any number, and what connection_registry allows an IP does not count for
	// them.
	// Default: as many as connection_registry allows.
	MaxConnectionsPerIP *int `json:"max_connections_per_ip,omitempty"`

	// How many connections each upstream may have, re-dials and moves included; it
	// gets no more. If all have as many, clients are refused with status 503. Zero:
	// any number.
	// Default: `0`.
	PerUpstream *int `json:"upstream_max_connections,omitempty"`

	// Where pages may come from that connect: `https://example.com`, or without a
	// scheme for any; `*` stands for any text. Others are
	// refused with status 403 before anything is dialed. Clients that send no Origin
	// are no browsers and are let in.
	// Default: anywhere.
	AllowedOrigins []string `json:"allowed_origins,omitempty"`

	// The largest message of a client, in bytes of payload on the wire over all its
	// fragments: a compressed one counts as it is. As soon as a frame's header says
	// that its message is larger, the client is closed with code 1009 and the backend
	// with 1001; what came of that message before may have been passed on. Zero: any
	// size.
	// Default: `0`.
	ClientMaxMessageSize *int64 `json:"client_max_message_size,omitempty"`

	// The largest message of a backend, likewise; the client and the backend are
	// closed with code 1009. Zero: any size.
	// Default: `0`.
	ServerMaxMessageSize *int64 `json:"server_max_message_size,omitempty"`
}

// Live are the groups that matter to live connections; nil is all defaults.
type Live struct {
	KeepAlive   *KeepAlive
	Resume      *Resume
	Replay      *Replay
	Limits      *Limits
	DrainWindow *caddy.Duration
}

// Session returns the settings of live connections, with the defaults filled in.
func (l Live) Session() (session.Settings, error) {
	k, r, p, m := orZero(l.KeepAlive), orZero(l.Resume), orZero(l.Replay), orZero(l.Limits)
	mode := replay.Unacked
	if p.Mode != "" {
		var err error
		if mode, err = replay.ParseMode(p.Mode); err != nil {
			return session.Settings{}, err
		}
	}
	shortest := DurationOr(r.MinInterval, ResumeMin)
	return session.Settings{
		PingInterval:     DurationOr(k.PingInterval, PingInterval),
		PingTimeout:      DurationOr(k.PingTimeout, PingTimeout),
		IdleTimeout:      DurationOr(k.IdleTimeout, 0),
		FirstDataTimeout: DurationOr(k.FirstDataTimeout, 0),
		MaxLifetime:      DurationOr(k.MaxLifetime, 0),
		WriteTimeout:     DurationOr(k.WriteTimeout, WriteTimeout),

		ClientMaxMessage: orZero(m.ClientMaxMessageSize),
		ServerMaxMessage: orZero(m.ServerMaxMessageSize),

		ResumeTimeout: DurationOr(r.Timeout, ResumeTimeout),
		ResumeMin:     shortest,
		ResumeMax:     DurationOr(r.MaxInterval, max(ResumeMax, shortest)),
		ResumeOn:      ValueOr(r.CloseCodes, resumeOn),
		ResumeLimit:   ValueOr(r.Limit, ResumeLimit),
		Replay:        mode,
		ReplayBuffer:  ValueOr(p.Buffer, ReplayBuffer),
		ReplayClose:   p.Overflow == "close",
		DrainWindow:   DurationOr(l.DrainWindow, DrainWindow),
	}, nil
}

// Check refuses values that mean nothing; the error names the setting.
func (l Live) Check(t *Transport) error {
	c, k, r, p, m := orZero(t), orZero(l.KeepAlive), orZero(l.Resume), orZero(l.Replay), orZero(l.Limits)
	err := First(
		Positive("dial_timeout", c.DialTimeout), Positive("handshake_timeout", c.HandshakeTimeout),
		NotNegative("ping_interval", k.PingInterval), Positive("ping_timeout", k.PingTimeout),
		NotNegative("idle_timeout", k.IdleTimeout), NotNegative("first_data_timeout", k.FirstDataTimeout),
		NotNegative("max_lifetime", k.MaxLifetime), NotNegative("write_timeout", k.WriteTimeout),
		NotNegative("resume_timeout", r.Timeout),
		Positive("resume_interval", r.MinInterval), Positive("resume_interval", r.MaxInterval),
		NotNegative("drain_window", l.DrainWindow),
		CheckCount("resume_concurrency", r.Concurrency, 1), CheckCount("resume_limit", r.Limit, 0),
		CheckSize("replay_buffer", p.Buffer),
		CheckCount("max_connections", m.MaxConnections, 0), CheckCount("max_connections_per_ip", m.MaxConnectionsPerIP, 0),
		CheckCount("client_max_message_size", m.ClientMaxMessageSize, 0),
		CheckCount("server_max_message_size", m.ServerMaxMessageSize, 0),
	)
	if err != nil {
		return err
	}
	if r.MaxInterval != nil && time.Duration(*r.MaxInterval) < DurationOr(r.MinInterval, ResumeMin) {
		return fmt.Errorf("resume_interval: the longest, %s, must not be shorter than the shortest, %s",
			time.Duration(*r.MaxInterval), DurationOr(r.MinInterval, ResumeMin))
	}
	for _, code := range ValueOr(r.CloseCodes, nil) {
		if !frame.ValidCloseCode(code) {
			return fmt.Errorf("resume_on: %d is no close code that a backend can send", code)
		}
	}
	switch p.Overflow {
	case "", "pause", "close":
	default:
		return fmt.Errorf("unknown replay_overflow %q: want pause or close", p.Overflow)
	}
	_, err = l.Session() // the mode
	return err
}

// First returns the first error of several.
func First(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// Positive refuses a duration that is not positive.
func Positive(name string, d *caddy.Duration) error {
	if d != nil && *d <= 0 {
		return fmt.Errorf("%s must be positive: %s", name, time.Duration(*d))
	}
	return nil
}

// NotNegative refuses a negative duration.
func NotNegative(name string, d *caddy.Duration) error {
	if d != nil && *d < 0 {
		return fmt.Errorf("%s must not be negative: %s", name, time.Duration(*d))
	}
	return nil
}

// CheckSize refuses a size that is not positive.
func CheckSize(name string, size *int64) error {
	if size != nil && *size <= 0 {
		return fmt.Errorf("%s must be positive: %d", name, *size)
	}
	return nil
}

// CheckCount refuses a number below least.
func CheckCount[N int | int64](name string, n *N, least N) error {
	if n != nil && *n < least {
		return fmt.Errorf("%s must be at least %d: %d", name, least, *n)
	}
	return nil
}

// DurationOr returns the duration, or otherwise if it is unset.
func DurationOr(d *caddy.Duration, otherwise time.Duration) time.Duration {
	return time.Duration(ValueOr(d, caddy.Duration(otherwise)))
}

// ValueOr returns the value, or otherwise if it is unset.
func ValueOr[T any](v *T, otherwise T) T {
	if v == nil {
		return otherwise
	}
	return *v
}

func orZero[T any](v *T) T {
	var zero T
	return ValueOr(v, zero)
}
