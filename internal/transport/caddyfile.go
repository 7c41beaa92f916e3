// This file has the settings' checks and their Caddyfile syntax.

package transport

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"time"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"github.com/caddyserver/caddy/v2/modules/caddytls"
)

// Check refuses settings that mean nothing. The error names the setting as a
// Caddyfile does.
func Check(settings *reverseproxy.TLSConfig, proxyProtocol string) error {
	if _, ok := proxyVersions[proxyProtocol]; !ok {
		return fmt.Errorf("unknown proxy_protocol %q: want v1 or v2", proxyProtocol)
	}
	if settings == nil {
		return nil
	}
	if settings.HandshakeTimeout < 0 {
		return fmt.Errorf("tls_timeout must not be negative: %s", time.Duration(settings.HandshakeTimeout))
	}
	if err := checkRenegotiation(settings.Renegotiation); err != nil {
		return err
	}
	for _, port := range settings.ExceptPorts {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return fmt.Errorf("tls_except_ports: invalid port %q", port)
		}
	}
	for _, curve := range settings.Curves {
		if _, ok := caddytls.SupportedCurves[curve]; !ok {
			return fmt.Errorf("tls_curves: unknown curve %q", curve)
		}
	}
	return nil
}

func checkRenegotiation(level string) error {
	switch level {
	case "", "never", "once", "freely":
		return nil
	default:
		return fmt.Errorf("unknown tls_renegotiation %q: want never, once or freely", level)
	}
}

// tlsSubdirectives are those of reverse_proxy's HTTP transport that are about
// TLS, and how many arguments they take.
var tlsSubdirectives = map[string]struct {
	least, most int
	block       bool
}{
	"tls":                      {},
	"tls_client_auth":          {least: 1, most: 2}, // a name to automate, or two files
	"tls_curves":               {least: 1, most: math.MaxInt},
	"tls_except_ports":         {least: 1, most: math.MaxInt},
	"tls_insecure_skip_verify": {},
	"tls_renegotiation":        {least: 1, most: 1},
	"tls_server_name":          {least: 1, most: 1},
	"tls_timeout":              {least: 1, most: 1},
	"tls_trust_pool":           {least: 1, most: math.MaxInt, block: true}, // the module's
	"tls_trusted_ca_certs":     {least: 1, most: math.MaxInt},
}

// ParseTLS adds the subdirective at d to the settings, or returns false if it is
// none about TLS. Any of them turns TLS on. Each may be there once, which is for
// the caller to see to. What it means is left to reverse_proxy, which is more
// lenient with arguments.
func ParseTLS(d *caddyfile.Dispenser, settings **reverseproxy.TLSConfig) (known bool, err error) {
	name := d.Val()
	takes, known := tlsSubdirectives[name]
	if !known {
		return false, nil
	}
	count := d.CountRemainingArgs()
	segment := caddyfile.Segment{d.Token()}
	if takes.block {
		segment = d.NextSegment()
	} else {
		segment = append(segment, d.RemainingArgsAsTokens()...)
	}
	args := segment[1 : 1+count]
	if count < takes.least {
		return true, d.Errf("%s: missing argument", name)
	}
	if count > takes.most {
		return true, d.Errf("%s: surplus argument %q", name, args[takes.most].Text)
	}
	for _, arg := range args {
		if arg.Text == "" { // which would mean unset
			return true, d.Errf("%s: invalid value %q", name, arg.Text)
		}
	}
	if name == "tls_renegotiation" { // of which reverse_proxy would say that its arguments are too many
		if err := checkRenegotiation(args[0].Text); err != nil {
			return true, d.WrapErr(err)
		}
	}
	t := reverseproxy.HTTPTransport{TLS: *settings}
	if err := t.UnmarshalCaddyfile(asTransport(segment)); err != nil {
		return true, fmt.Errorf("%s: %w", name, err)
	}
	if err := Check(t.TLS, ""); err != nil {
		return true, d.WrapErr(err)
	}
	*settings = t.TLS
	return true, nil
}

// asTransport puts a subdirective into the block of an HTTP transport, on lines
// of its own.
func asTransport(segment caddyfile.Segment) *caddyfile.Dispenser {
	first, last := segment[0], segment[len(segment)-1]
	above, below := first.Line-1, last.Line+last.NumLineBreaks()+1
	return caddyfile.NewDispenser(slices.Concat(
		caddyfile.Segment{{File: first.File, Line: above, Text: "http"}, {File: first.File, Line: above, Text: "{"}},
		segment,
		caddyfile.Segment{{File: last.File, Line: below, Text: "}"}},
	))
}
