// This file holds the probes: one look at an upstream each.

package health

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"sync"
	"time"

	"github.com/gobwas/ws"
	"golang.org/x/net/http/httpguts"

	"github.com/caddyserver/caddy/v2"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
	"github.com/holdfast-proxy/caddy-holdfast/internal/handshake"
)

const (
	// userAgent tells backends what asks, unless a header says otherwise.
	userAgent = "caddy-holdfast (health check)"

	// maxBody bounds what is read of a body, and what a WebSocket backend may send
	// before its close frame, in bytes.
	maxBody = 1 << 20

	// maxResponseHeader bounds a response's header, in bytes, as in handshake.
	maxResponseHeader = 1 << 20

	// closeTimeout is how long a backend that has passed may take for its close frame.
	closeTimeout = time.Second
)

// Probe looks once whether an upstream is healthy; the error says why not. It
// returns as soon as ctx is done, which is its only limit of time, and by then it has
// closed what it opened.
type Probe func(ctx context.Context, t Target) error

// Target is how a probe finds the upstream.
type Target struct {
	// Dial connects as for a client, with TLS and a PROXY header where clients
	// have them (a layer-4 upstream's own TLS is the client's, not ours). port
	// replaces the upstream's unless it is empty. It may be called by two goroutines at
	// once, and must return when ctx is done.
	Dial func(ctx context.Context, port string) (net.Conn, error)

	// Host is what goes into the Host header unless the check's headers say
	// otherwise, and, without a port, the name that a TLS check asks for. The path
	// of a socket stands for localhost.
	Host string
}

// host returns Host, or, as reverse_proxy does, localhost if it cannot be one.
func (t *Target) host() string {
	if t.Host == "" || !httpguts.ValidHostHeader(t.Host) {
		return "localhost"
	}
	return t.Host
}

// named puts the subdirective in front of the probe's error.
func named(name string, p Probe) Probe {
	return func(ctx context.Context, t Target) error {
		if err := p(ctx, t); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		return nil
	}
}

// all returns a probe that passes if all do. They run at once, so that together they
// take no longer than one may; each is left to say what is wrong.
func all(probes []Probe) Probe {
	if len(probes) == 1 {
		return probes[0]
	}
	return func(ctx context.Context, t Target) error {
		errs := make([]error, len(probes))
		var running sync.WaitGroup
		for i, p := range probes {
			running.Go(func() { errs[i] = p(ctx, t) })
		}
		running.Wait()
		var failed error
		for _, err := range errs {
			switch {
			case failed == nil:
				failed = err
			case err != nil:
				failed = fmt.Errorf("%w; %w", failed, err)
			}
		}
		return failed
	}
}

// wsProbe makes a WebSocket handshake.
type wsProbe struct{ exchange *exchange }

func newWSProbe(c *WSCheck) (*wsProbe, error) {
	x, err := c.compile(wsStatus)
	return &wsProbe{x}, err
}

func (p *wsProbe) run(ctx context.Context, t Target) error {
	host, header, err := p.exchange.request(t)
	if err != nil {
		return err
	}
	q, err := handshake.NewProbe(p.exchange.uri.RequestURI(), host, header)
	if err != nil {
		return err
	}
	conn, err := t.Dial(ctx, p.exchange.port)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer cutAfter(ctx, conn)()
	res, err := q.Do(conn, handshake.Upstream{})
	if err != nil {
		return err
	}
	err = p.exchange.expect.check(res.HTTP)
	if res.Upgraded {
		leave(ctx, conn, res.Early)
	}
	return err
}

// leave closes a WebSocket as RFC 6455 §7.1.1 has it, so that the backend has
// nothing to complain of. How the backend takes it is no part of the check.
func leave(ctx context.Context, conn net.Conn, early []byte) {
	ctx, cancel := context.WithTimeout(ctx, closeTimeout)
	defer cancel()
	defer cutAfter(ctx, conn)()
	if _, err := conn.Write(frame.AppendClose(nil, uint16(ws.StatusNormalClosure), "", true)); err != nil {
		return
	}
	r := bufio.NewReader(io.LimitReader(io.MultiReader(bytes.NewReader(early), conn), maxBody))
	for {
		h, err := ws.ReadHeader(r)
		if err != nil || h.OpCode == ws.OpClose {
			return
		}
		if _, err := io.CopyN(io.Discard, r, h.Length); err != nil {
			return
		}
	}
}

// httpProbe makes an HTTP request.
type httpProbe struct {
	exchange *exchange
	method   string
	body     *regexp.Regexp // nil: the body does not matter
}

func newHTTPProbe(c *HTTPCheck) (*httpProbe, error) {
	x, err := c.compile(httpStatus)
	if err != nil {
		return nil, err
	}
	p := &httpProbe{exchange: x, method: c.Method}
	switch {
	case p.method == "":
		p.method = http.MethodGet
	case !httpguts.ValidHeaderFieldName(p.method), p.method == http.MethodConnect: // a method is a token too
		return nil, fmt.Errorf("method: invalid method %q", p.method)
	}
	if c.ExpectBody == "" {
		return p, nil
	}
	if p.method == http.MethodHead {
		return nil, fmt.Errorf("expect_body: %q cannot match: the response to a HEAD has no body", c.ExpectBody)
	}
	if p.body, err = compilePattern(c.ExpectBody); err != nil {
		return nil, fmt.Errorf("expect_body: %w", err)
	}
	return p, nil
}

func (p *httpProbe) run(ctx context.Context, t Target) error {
	host, header, err := p.exchange.request(t)
	if err != nil {
		return err
	}
	conn, err := t.Dial(ctx, p.exchange.port)
	if err != nil {
		return err
	}
	defer conn.Close()
	// A transport of its own, over a connection that is there already: nothing is
	// kept, followed, retried or sent through a proxy.
	transport := &http.Transport{
		DialContext:            func(context.Context, string, string) (net.Conn, error) { return conn, nil },
		DisableKeepAlives:      true,
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxResponseHeader,
	}
	u := *p.exchange.uri
	u.Scheme, u.Host = "http", "upstream" // which nobody sees
	req := (&http.Request{Method: p.method, URL: &u, Host: host, Header: header}).WithContext(ctx)
	res, err := transport.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("HTTP request: %w", err)
	}
	defer res.Body.Close()
	if err := p.exchange.expect.check(res); err != nil || p.body == nil {
		return err
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, maxBody))
	if err != nil {
		return fmt.Errorf("reading body: %w", err)
	}
	if !p.body.Match(body) {
		return fmt.Errorf("expect_body: no match in %d bytes", len(body))
	}
	return nil
}

// request returns what of a request is not known before it is made.
func (x *exchange) request(t Target) (host string, header http.Header, err error) {
	host, header = t.host(), make(http.Header, len(x.headers))
	replacer := caddy.NewReplacer()
	for field, values := range x.headers {
		for _, value := range values {
			value = replacer.ReplaceKnown(value, "")
			switch {
			case !validValue(field, value):
				// The value may be a secret that a placeholder stands for.
				return "", nil, fmt.Errorf("header: the value of %q cannot be sent", field)
			case field == "Host":
				host = value
			default:
				header.Add(field, value)
			}
		}
	}
	return host, header, nil
}

// tcpProbe connects.
type tcpProbe struct{ port string }

func (p *tcpProbe) run(ctx context.Context, t Target) error {
	conn, err := t.Dial(ctx, p.port)
	if err != nil {
		return err
	}
	_ = conn.Close()
	return nil
}

// tlsProbe makes a TLS handshake.
type tlsProbe struct{ port, serverName string }

func (p *tlsProbe) run(ctx context.Context, t Target) error {
	conn, err := t.Dial(ctx, p.port)
	if err != nil {
		return err
	}
	defer conn.Close()
	name := p.serverName
	if name == "" {
		name = t.host()
		if host, _, err := net.SplitHostPort(name); err == nil {
			name = host
		}
	}
	tunnel := tls.Client(conn, &tls.Config{
		ServerName:         name,
		InsecureSkipVerify: true,             //nolint:gosec // see TLSCheck
		MinVersion:         tls.VersionTLS10, // the clients may be content with it
	})
	if err := tunnel.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS handshake: %w", err)
	}
	_ = tunnel.Close() // what the backend makes of a certificate that it misses
	return nil
}

// cutAfter ends what conn waits for when ctx is done, until stop is called.
func cutAfter(ctx context.Context, conn net.Conn) (stop func() bool) {
	return context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
}
