// This file holds the settings of active health checks as they stand in JSON,
// their defaults and their checks.

package health

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http/httpguts"

	"github.com/caddyserver/caddy/v2"

	"github.com/holdfast-proxy/caddy-holdfast/internal/settings"
)

// Defaults.
const (
	Interval = 60 * time.Second
	Timeout  = 3 * time.Second
	Fails    = 1
	Passes   = 1

	wsStatus   = "101"
	httpStatus = "200-399"
)

// Schedule says when an upstream is probed, and what the results mean.
type Schedule struct {
	// How often each upstream is probed; up to 10 % sooner, at random. It must be
	// positive.
	// Default: `60s`.
	Interval *caddy.Duration `json:"interval,omitempty"`

	// How long one probe may take, from the connect to the last byte that is
	// waited for. One that takes longer has failed. It must be positive.
	// Default: `3s`.
	Timeout *caddy.Duration `json:"timeout,omitempty"`

	// How many probes in a row must fail before a healthy upstream is unhealthy.
	// At least 1.
	// Default: `1`.
	Fails *int `json:"fails,omitempty"`

	// How many probes in a row must pass before an unhealthy upstream is healthy.
	// At least 1.
	// Default: `1`.
	Passes *int `json:"passes,omitempty"`
}

// Active has the active health checks of a pool of WebSocket backends. At least
// one of ws and http must be there; with both, both must pass.
type Active struct {
	Schedule

	// A WebSocket handshake.
	WS *WSCheck `json:"ws,omitempty"`

	// An HTTP request.
	HTTP *HTTPCheck `json:"http,omitempty"`
}

// WSCheck is a true WebSocket handshake. Once it is accepted the connection is
// closed with code 1000.
type WSCheck struct {
	// The status is 101 by default. A 101 must be a true one: with the right
	// Upgrade, Connection and Sec-WebSocket-Accept.
	Exchange
}

// HTTPCheck is an HTTP/1.1 request. No redirect is followed.
type HTTPCheck struct {
	// The status is 200-399 by default.
	Exchange

	// The request's method.
	// Default: `GET`.
	Method string `json:"method,omitempty"`

	// A regular expression that must match somewhere in the first 1 MiB of the
	// response's body. Empty: the body is not read.
	// Default: empty.
	ExpectBody string `json:"expect_body,omitempty"`
}

// Exchange is a request, and what is expected of the response.
type Exchange struct {
	// The path, and a query if there is one. It must begin with `/`.
	// Default: `/`.
	URI string `json:"uri,omitempty"`

	// The port to connect to, 1 to 65535.
	// Default: the upstream's own.
	Port *int `json:"port,omitempty"`

	// Header fields to send. Host replaces the upstream's. Values may have global
	// placeholders, which are replaced for every probe.
	// Default: a User-Agent.
	Headers http.Header `json:"headers,omitempty"`

	// The status codes that pass: a code (`101`), a range (`200-299`) or a class
	// (`2xx`). Several are alternatives.
	// Default: see the check.
	ExpectStatus []string `json:"expect_status,omitempty"`

	// What the response's header fields must be. All rules must hold.
	// Default: none.
	ExpectHeaders []*HeaderRule `json:"expect_headers,omitempty"`
}

// HeaderRule is what a header field of a response must be. With neither a value
// nor a pattern the field must be there, be it empty. Each line of a field is a
// value of its own, as a whole: lists with commas are not split.
type HeaderRule struct {
	// The field's name, in any case.
	Field string `json:"field,omitempty"`

	// What one of the field's values must be, exactly. Empty: the field must be
	// absent, or all its values empty.
	// Default: any value will do.
	Value *string `json:"value,omitempty"`

	// A regular expression that must match somewhere in one of the field's
	// values. It excludes value.
	// Default: any value will do.
	Pattern string `json:"pattern,omitempty"`
}

// ActiveLayer4 has the active health checks of a pool of TCP backends. At least one
// of tcp and tls must be there.
type ActiveLayer4 struct {
	Schedule

	// The port to connect to, 1 to 65535.
	// Default: the upstream's own.
	Port *int `json:"port,omitempty"`

	// Whether it is a check to connect. A TLS check does that too.
	// Default: `false`.
	TCP bool `json:"tcp,omitempty"`

	// A TLS handshake.
	TLS *TLSCheck `json:"tls,omitempty"`
}

// TLSCheck is a TLS handshake. The certificate is not verified: a passthrough has
// nothing to say whom its clients trust. A backend that wants a certificate from
// its clients passes with TLS 1.3, where it says so only after the handshake; below
// that, check with tcp instead.
type TLSCheck struct {
	// The server name to ask for.
	// Default: the upstream's host; none if that is an IP address.
	ServerName string `json:"server_name,omitempty"`
}

// Spec returns the schedule with the defaults filled in, as Watch wants it.
func (s *Schedule) Spec() Spec {
	return Spec{
		Interval: settings.DurationOr(s.Interval, Interval),
		Timeout:  settings.DurationOr(s.Timeout, Timeout),
		Fails:    settings.ValueOr(s.Fails, Fails),
		Passes:   settings.ValueOr(s.Passes, Passes),
	}
}

// Checked is what is checked, in which schedules do not differ.
func (a *Active) Checked() any { return []any{a.WS, a.HTTP} }

// Check refuses settings that mean nothing; the error names the subdirective.
func (a *Active) Check() error {
	_, err := a.Compile()
	return err
}

// Compile returns the probe that the settings describe, and Check's error.
func (a *Active) Compile() (Probe, error) {
	if err := a.check(); err != nil {
		return nil, err
	}
	if a.WS == nil && a.HTTP == nil {
		return nil, fmt.Errorf("%s needs health_ws or health_http", a.firstSet())
	}
	var probes []Probe
	if a.WS != nil {
		p, err := newWSProbe(a.WS)
		if err != nil {
			return nil, fmt.Errorf("health_ws: %w", err)
		}
		probes = append(probes, named("health_ws", p.run))
	}
	if a.HTTP != nil {
		p, err := newHTTPProbe(a.HTTP)
		if err != nil {
			return nil, fmt.Errorf("health_http: %w", err)
		}
		probes = append(probes, named("health_http", p.run))
	}
	return all(probes), nil
}

// Checked is what is checked, in which schedules do not differ.
func (a *ActiveLayer4) Checked() any { return []any{a.Port, a.TCP, a.TLS} }

// Check refuses settings that mean nothing; the error names the subdirective.
func (a *ActiveLayer4) Check() error {
	_, err := a.Compile()
	return err
}

// Compile returns the probe that the settings describe, and Check's error.
func (a *ActiveLayer4) Compile() (Probe, error) {
	if err := a.check(); err != nil {
		return nil, err
	}
	port, err := portText(a.Port)
	switch {
	case err != nil:
		return nil, fmt.Errorf("health_port: %w", err)
	case a.TLS != nil:
		p := &tlsProbe{port: port, serverName: a.TLS.ServerName}
		return named("health_tls", p.run), nil
	case a.TCP:
		p := &tcpProbe{port: port}
		return named("health_tcp", p.run), nil
	}
	set := a.firstSet()
	if set == unset && a.Port != nil {
		set = "health_port"
	}
	return nil, fmt.Errorf("%s needs health_tcp or health_tls", set)
}

func (s *Schedule) check() error {
	return settings.First(
		settings.Positive("health_interval", s.Interval), settings.Positive("health_timeout", s.Timeout),
		settings.CheckCount("health_fails", s.Fails, 1), settings.CheckCount("health_passes", s.Passes, 1),
	)
}

// unset is what an error calls checks of which nothing is set.
const unset = "an active health check"

// firstSet names the first setting that is set, for errors.
func (s *Schedule) firstSet() string {
	switch {
	case s.Interval != nil:
		return "health_interval"
	case s.Timeout != nil:
		return "health_timeout"
	case s.Fails != nil:
		return "health_fails"
	case s.Passes != nil:
		return "health_passes"
	default:
		return unset
	}
}

// exchange is a compiled Exchange.
type exchange struct {
	uri     *url.URL
	port    string      // empty: the upstream's own
	headers http.Header // names are canonical, values may have placeholders
	expect  expectation
}

// ownHeaders are the fields that a probe writes itself, or that would change how
// its request is read.
var ownHeaders = []string{
	"Connection", "Content-Length", "Keep-Alive", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade",
	"Sec-Websocket-Accept", "Sec-Websocket-Extensions", "Sec-Websocket-Key", "Sec-Websocket-Version",
}

func (x *Exchange) compile(status string) (*exchange, error) {
	c := &exchange{headers: make(http.Header)}
	var err error
	if c.uri, err = parseURI(x.URI); err != nil {
		return nil, err
	}
	if c.port, err = portText(x.Port); err != nil {
		return nil, fmt.Errorf("port: %w", err)
	}
	c.headers.Set("User-Agent", userAgent)
	given := make(http.Header, len(x.Headers))
	for field, values := range x.Headers {
		for _, value := range values {
			if err := checkHeader(field, value); err != nil {
				return nil, fmt.Errorf("header: %w", err)
			}
			given.Add(field, value)
		}
	}
	maps.Copy(c.headers, given)
	if len(given["Host"]) > 1 {
		return nil, fmt.Errorf("header: more than one Host: %q", given["Host"])
	}
	c.expect, err = newExpectation(x, status)
	return c, err
}

// parseURI reads what stands in a request line.
func parseURI(uri string) (*url.URL, error) {
	if uri == "" {
		uri = "/"
	}
	switch u, err := url.ParseRequestURI(uri); {
	case !strings.HasPrefix(uri, "/"):
		return nil, fmt.Errorf("invalid URI %q: it must begin with /", uri)
	case err != nil:
		return nil, fmt.Errorf("invalid URI %q: %w", uri, errors.Unwrap(err))
	case strings.ContainsAny(uri, " #"):
		return nil, fmt.Errorf("invalid URI %q: there can be no space and no fragment", uri)
	default:
		return u, nil
	}
}

// checkHeader refuses a field that cannot be sent. What a placeholder brings is
// checked when it is known.
func checkHeader(field, value string) error {
	if !httpguts.ValidHeaderFieldName(field) {
		return fmt.Errorf("invalid field %q", field)
	}
	field = http.CanonicalHeaderKey(field)
	if slices.Contains(ownHeaders, field) {
		return fmt.Errorf("%q is up to the check", field)
	}
	if !validValue(field, value) && !strings.Contains(value, "{") {
		return fmt.Errorf("invalid value %q of %q", value, field)
	}
	return nil
}

func validValue(field, value string) bool {
	if field == "Host" && (value == "" || !httpguts.ValidHostHeader(value)) {
		return false
	}
	return httpguts.ValidHeaderFieldValue(value)
}

// portText returns the port as text, empty if it is unset.
func portText(port *int) (string, error) {
	switch {
	case port == nil:
		return "", nil
	case *port < 1 || *port > 65535:
		return "", fmt.Errorf("invalid port %q", strconv.Itoa(*port))
	default:
		return strconv.Itoa(*port), nil
	}
}
